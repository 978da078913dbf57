"""The journal of a job: JSON lines, what the job is (the first line), then each finished unit of work.

A line counts once its newline is on the disk. Only the last one can be torn (each is fsynced before the next
is begun); it is dropped, and the next line takes its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from bitgrain.checkpoints.durable import fsync_folder, output_errors, pwrite_all
from bitgrain.errors import ResumeError

_VERSION = 1
_ABSENT = object()


@dataclass(frozen=True)
class Unit:
    """A finished unit: sha256 (hex) of each tensor it wrote, and the caller's own record."""

    name: str
    tensors: Mapping[str, str]
    record: Mapping[str, Any]


class Journal:
    """`units` is what was finished when the journal was opened, by name, a repeated one as last written."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open or begin the journal at `path`. `fingerprint` must be JSON with string keys.

        Raises ResumeError when it belongs to another job (the text lists what changed) or is damaged,
        OutputError when it cannot be read or written.
        """
        self._path = path
        self._lock = Lock()
        wanted = json.loads(_line(fingerprint))
        with output_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with output_errors(path), open(self._fd, "rb", closefd=False) as file:
                data = file.read()
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
            head, self.units, self._end = _parse(lines, path)
            if head is None:
                self._append({"bitgrain_journal": _VERSION, "fingerprint": wanted})
                fsync_folder(path.parent)
            elif differences := changes(head, wanted):
                raise ResumeError(_refusal(path.parent, differences))
        except BaseException:
            self.close()
            raise

    def add(self, unit: Unit) -> None:
        """Append a unit, durably. Thread-safe. Raises OutputError."""
        self._append({"unit": unit.name, "tensors": dict(unit.tensors), "record": dict(unit.record)})

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, value: Mapping[str, Any]) -> None:
        line = _line(value)
        with self._lock, output_errors(self._path):
            os.ftruncate(self._fd, self._end)  # what an append that failed has left
            pwrite_all(self._fd, line, self._end)
            os.fsync(self._fd)
            self._end += len(line)


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, key by key: `a / b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in changes(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{where} / {key}" if where else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for at, (a, b) in pairs for line in changes(a, b, f"{where}[{at}]")]
    return [] if old == new and type(old) is type(new) else [f"{where}: {_shown(old)} -> {_shown(new)}"]


def _refusal(partial: Path, differences: list[str]) -> str:
    shown = [f"  {line}" for line in differences[:20]]
    if len(differences) > 20:
        shown.append(f"  and {len(differences) - 20} more")
    return "\n".join(
        [
            f"{partial}: a run was begun here with other settings or sources (then -> now):",
            *shown,
            "Go back to them to resume, or start over: remove that folder, or pass --restart.",
        ]
    )


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _parse(lines: list[bytes], path: Path) -> tuple[Any, dict[str, Unit], int]:
    """(fingerprint or None, units, bytes of the lines that count)."""
    head: Any = None
    units: dict[str, Unit] = {}
    end = 0
    for number, (line, value) in enumerate(_values(lines, path)):
        if number == 0:
            if value.get("bitgrain_journal") != _VERSION:
                raise _damaged(path, 1)
            head = value["fingerprint"]
        else:
            unit = Unit(value["unit"], value["tensors"], value["record"])
            units.pop(unit.name, None)
            units[unit.name] = unit
        end += len(line)
    return head, units, end


def _values(lines: list[bytes], path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    wanted = {"bitgrain_journal", "fingerprint"}
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or value.keys() != wanted:
            if number == len(lines) - 1:
                return  # a crash of the machine may leave the last line's length without its bytes
            raise _damaged(path, number + 1)
        yield line, value
        wanted = {"unit", "tensors", "record"}


def _damaged(path: Path, number: int) -> ResumeError:
    return ResumeError(
        f"{path}: line {number} is damaged, so the half-done run cannot be resumed. "
        f"Start over: remove {path.parent}, or pass --restart."
    )
