"""Writing a conversion's weight files: units of tensors on several threads, and each file's hash close behind them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from bitgrain.checkpoints.durable import pread_into
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.reader import INDEX_FILE, opened
from bitgrain.checkpoints.shard_writer import PART
from bitgrain.checkpoints.shards import ShardLayout, index_bytes
from bitgrain.errors import CheckpointError
from bitgrain.pipeline.threads import work_through
from bitgrain.progress import Progress

UNIT_BYTES = 32_000_000
_CHUNK = 4 << 20


class Planned(Protocol):
    """A tensor to be written."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


def write_units(
    job: JobFolder,
    shards: Sequence[ShardLayout],
    outputs: Mapping[str, Sequence[Planned]],
    make: Callable[[str], Mapping[str, Tensor]],
    target: str,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Write what is not written yet; size and sha256 of every file then.

    outputs  by original tensor, what is made of it; `make` makes it, for several originals at once
    """
    units = units_of({name: sum(one.nbytes for one in planned) for name, planned in outputs.items()})
    todo = [unit for unit in units if unit[0] not in job.done]

    def work(unit: tuple[str, ...]) -> tuple[str, ...]:
        tensors: dict[str, Tensor] = {}
        for name in unit:
            tensors |= make(name)
        job.commit_unit(unit[0], tensors)
        return unit

    def names(unit: tuple[str, ...]) -> list[str]:
        return [one.name for name in unit for one in outputs[name]]

    digests = [_Digest(job, shard) for shard in shards]
    progress.start(sum(map(len, todo)), "tensors", f"writing {target}")
    with ThreadPoolExecutor(1, thread_name_prefix="bitgrain-hash") as behind:
        try:
            followed = [behind.submit(_follow, digests, names(unit)) for unit in units if unit[0] in job.done]
            for unit in work_through(work, todo, torch.get_num_threads() + 1):  # one waits for the disk
                followed.append(behind.submit(_follow, digests, names(unit)))
                progress.advance(len(unit), unit[-1])
            for one in followed:
                one.result()
        finally:
            progress.finish()
            behind.shutdown(cancel_futures=True)
    found = {shard.file: digest.finish() for shard, digest in zip(shards, digests, strict=True)}
    if (index := index_bytes(shards)) is not None:
        found[INDEX_FILE] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    return found


def units_of(sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Tensors in their order, about `UNIT_BYTES` together: the same for the same sizes, so that a job can be resumed.
    The first one's name is the unit's."""
    units: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not units or held + size > UNIT_BYTES:
            units.append([])
            held = 0
        units[-1].append(name)
        held += size
    return [tuple(unit) for unit in units]


def _follow(digests: Iterable[_Digest], names: Sequence[str]) -> None:
    for digest in digests:
        digest.follow(names)


class _Digest:
    """sha256 of one file, read back as far as all its tensors are written."""

    def __init__(self, job: JobFolder, shard: ShardLayout) -> None:
        part = job.files / (shard.file + PART)
        self._path = part if part.exists() else job.files / shard.file
        self._nbytes = shard.nbytes
        self._ends = {placed.spec.name: placed.offset + placed.spec.nbytes for placed in shard.tensors}
        self._order = sorted(self._ends, key=lambda name: self._ends[name])
        self._written: set[str] = set()
        self._next, self._position = 0, 0
        self._sha256 = hashlib.sha256()

    def follow(self, names: Iterable[str]) -> None:
        """These tensors are written."""
        self._written.update(name for name in names if name in self._ends)
        stop = self._position
        while self._next < len(self._order) and self._order[self._next] in self._written:
            stop = self._ends[self._order[self._next]]
            self._next += 1
        self._read(stop)

    def finish(self) -> dict[str, Any]:
        """Of the whole file, which is written."""
        self._read(self._nbytes)
        return {"bytes": self._nbytes, "sha256": self._sha256.hexdigest()}

    def _read(self, stop: int) -> None:
        if stop <= self._position:
            return
        buffer = memoryview(bytearray(min(_CHUNK, stop - self._position)))
        with opened(self._path) as fd:
            while self._position < stop:
                piece = buffer[: min(len(buffer), stop - self._position)]
                if pread_into(fd, piece, self._position) < len(piece):
                    raise CheckpointError(f"{self._path}: {os.fstat(fd).st_size} bytes, {stop} were written")
                self._sha256.update(piece)
                self._position += len(piece)
