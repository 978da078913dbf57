"""OUT appears whole or not at all, and a job killed at any moment goes on where it was.

What lies beside OUT while a job runs:

    OUT.partial/lock             held (flock) by the running process; its text says which one
    OUT.partial/journal.jsonl    what the job is, then its finished units (`journal`)
    OUT.partial/scratch          a small file being written, before it is renamed into files/
    OUT.partial/work/            what a job that works in several passes keeps between them (`JobFolder.work`)
    OUT.partial/files/           what becomes OUT

The order of steps, and why a kill between any two of them loses nothing:

1. mkdir OUT.partial, lock, journal with the fingerprint, mkdir files, shards at full size under `*.part`.
   Each step accepts that it was done before, and the layout is part of the fingerprint.
2. A unit: its tensors are written, their files fsynced, and only then its line is appended and fsynced. A unit
   without a line is done again, over the same bytes. On resume the bytes of the units that have a line are
   hashed; a unit whose bytes do not match is done again (`redone` tells).
3. finish: shards get their final names, all is fsynced. A kill here: the next run gives them back their `.part`
   names, finds all units done, and comes here again.
4. rename OUT.partial/files -> OUT, atomic on one file system. This is the commit point: the journal is outside
   of what is renamed, so OUT never holds it, and it is still there if the process dies now.
5. The journal, the lock and OUT.partial are removed. A kill here: the next run finds OUT, a journal of the same
   fingerprint and no files/, checks that OUT holds the journal's bytes, and then has nothing left to do but 5.
   With the journal gone too, it says that OUT exists, as it does after any finished run, and tidies up.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitgrain.checkpoints.durable import fsync_folder, fsync_tree, output_errors, replace_file
from bitgrain.checkpoints.journal import Journal, Unit
from bitgrain.checkpoints.shard_writer import PART, ShardWriter, stored_file, stored_sha256
from bitgrain.checkpoints.shards import ShardLayout, layouts_sha256
from bitgrain.errors import OutputError, ResumeError

_LOCK, _JOURNAL, _SCRATCH, _FILES, _WORK = "lock", "journal.jsonl", "scratch", "files", "work"
_OURS = {_LOCK, _JOURNAL, _SCRATCH, _FILES, _WORK}


class JobFolder:
    """A job's output. Build with `JobFolder.open`; a context manager that lets go of the lock, and no more.

    After an exception from `commit_unit`, drop the object and open again: that unit is then done afresh.
    """

    def __init__(
        self,
        out: Path,
        stack: ExitStack,
        journal: Journal,
        writer: ShardWriter | None,
        done: Mapping[str, Unit],
        redone: tuple[str, ...],
    ) -> None:
        self.out = out
        self.redone = redone
        self._stack = stack
        self._journal = journal
        self._writer = writer
        self._done = {name: unit.record for name, unit in done.items()}

    @staticmethod
    def open(
        out: Path,
        fingerprint: Mapping[str, Any],
        layouts: Sequence[ShardLayout],
        *,
        restart: bool = False,
        verify_hashes: bool = True,
    ) -> JobFolder:
        """Begin the job that makes `out`, or resume it. `fingerprint` (JSON) is its settings and sources.

        `restart` throws away a half-done run first. `verify_hashes=False` trusts the bytes of finished units
        and checks only their files' sizes and headers.

        Raises OutputError when `out` exists, its parent folder is missing or not writable, or another process
        works on it; ResumeError when the half-done run has another fingerprint or layout.
        """
        out = Path(os.path.abspath(out))
        check_parent(out)
        partial = partial_folder(out)
        _check_theirs(partial)
        if os.path.lexists(out) and not partial.exists():
            raise _exists(out)
        with ExitStack() as stack:
            _lock(partial / _LOCK, out, stack)
            fsync_folder(out.parent)
            complete = os.path.lexists(out)  # asked under the lock: another process may just have finished
            if complete and (restart or (partial / _FILES).exists()):
                raise _exists(out)
            if restart:
                _wipe(partial)
            if (partial / _FILES).exists() and not (partial / _JOURNAL).exists():
                raise ResumeError(
                    f"{partial}: its journal is gone, so it cannot be resumed. "
                    "Start over: remove that folder, or pass --restart."
                )
            identity = {**fingerprint, "layout_sha256": layouts_sha256(layouts)}
            try:
                journal = Journal(partial / _JOURNAL, identity)
            except ResumeError as error:
                if complete:  # no files/: it keeps nothing that OUT lacks
                    _tidy(partial)
                    raise _exists(out) from error
                raise
            stack.callback(journal.close)
            folder = out if complete else partial / _FILES
            done = _intact(folder, layouts, journal.units, verify_hashes)
            redone = tuple(name for name in journal.units if name not in done)
            written = {name for unit in done.values() for name in unit.tensors}
            writer = None
            if not complete:
                with output_errors(folder):
                    folder.mkdir(exist_ok=True)
                fsync_folder(partial)
                writer = stack.enter_context(ShardWriter(folder, layouts, written))
            elif redone or written != _names(layouts):
                _tidy(partial)
                raise _exists(out)
            return JobFolder(out, stack.pop_all(), journal, writer, done, redone)

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> Mapping[str, Mapping[str, Any]]:
        """The finished units, from earlier runs and this one: the record of each, by name."""
        return MappingProxyType(self._done)

    @property
    def files(self) -> Path:
        """The folder that becomes OUT (OUT itself, if an earlier run got as far as that)."""
        return partial_folder(self.out) / _FILES if self._writer is not None else self.out

    @property
    def work(self) -> Path:
        """A folder for what the job itself keeps between its passes; it is gone when OUT appears."""
        path = partial_folder(self.out) / _WORK
        with output_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def commit_unit(
        self, unit: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any] | None = None
    ) -> None:
        """Write a unit's tensors (as planned in the layouts), then say in the journal that it is done.

        Durable when it returns; thread-safe. `record` is JSON, given back by `done` after a resume.
        Raises ValueError for a unit that is done, or tensors that do not fit the plan; OutputError.
        """
        if self._writer is None or unit in self._done:
            raise ValueError(f"unit {unit!r} is done already")
        hashes = {
            name: hashlib.sha256(self._writer.write(name, tensor)).hexdigest()
            for name, tensor in sorted(tensors.items())
        }
        self._writer.sync(hashes)
        self._journal.add(Unit(unit, hashes, record or {}))
        self._done[unit] = dict(record or {})

    def write_bytes(self, name: str, data: bytes) -> None:
        """Put a small file into the folder that becomes OUT, whole or not at all; one thread at a time.

        It is not in the journal: write it again in every run. Raises ValueError when `name` has a folder in it
        or is a weight file's; OutputError.
        """
        if name in ("", ".", "..") or Path(name).name != name or name.endswith((PART, ".safetensors")):
            raise ValueError(f"{name!r} is not a name for a file beside the weights")
        if self._writer is not None:
            replace_file(self.files / name, data, partial_folder(self.out) / _SCRATCH)

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` of UTF-8 text."""
        self.write_bytes(name, text.encode())

    def finish(self) -> None:
        """Make OUT appear. The object is closed afterwards.

        Raises ValueError when a planned tensor is missing, OutputError when OUT was made by another meanwhile.
        """
        partial = partial_folder(self.out)
        if self._writer is not None:
            self._writer.finish()
            fsync_tree(self.files)
            if os.path.lexists(self.out):  # rename would replace an empty folder
                raise _exists(self.out)
            with output_errors(self.out):
                os.rename(self.files, self.out)
            self._writer = None
            fsync_folder(self.out.parent)
        _tidy(partial)
        self.close()

    def close(self) -> None:
        """Let go of the lock and the files; what is done stays for the next run."""
        self._stack.close()


def partial_folder(out: Path) -> Path:
    """Where the half-done run of `out` is."""
    return out.parent / f"{out.name}.partial"


def _names(layouts: Sequence[ShardLayout]) -> set[str]:
    return {placed.spec.name for layout in layouts for placed in layout.tensors}


def _exists(out: Path) -> OutputError:
    return OutputError(f"{out}: exists already, and is never overwritten. Remove it, or choose another name.")


def check_new(out: Path, *, resumed: bool = False) -> None:
    """Raise OutputError unless a folder `out` can be made, and there is none (unless a job goes on)."""
    check_parent(out)
    if out.exists() and not resumed:
        raise _exists(out)


def check_parent(out: Path) -> None:
    """Raise OutputError unless a folder `out` can be made."""
    if not out.name:
        raise OutputError(f"{out}: not a name for a new folder. Choose one.")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: its parent folder does not exist. Make {out.parent} first.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: its parent folder cannot be written to. Choose another place.")


def _check_theirs(partial: Path) -> None:
    """Refuse to work in (or wipe) a folder that only happens to have the name."""
    if not os.path.lexists(partial):
        return
    with output_errors(partial):
        strangers = sorted(set(os.listdir(partial)) - _OURS) if partial.is_dir() else [partial.name]
    if strangers or partial.is_symlink():
        raise OutputError(
            f"{partial}: is in the way: it is not a half-done run (it holds {', '.join(strangers[:3]) or 'a link'}). "
            "Move it away, or choose another name."
        )


def _lock(path: Path, out: Path, stack: ExitStack) -> None:
    """Hold `path` until `stack` closes. A lock on a file that its last owner unlinked meanwhile is no lock."""
    while True:
        with output_errors(path):
            try:
                path.parent.mkdir(exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # its last owner took the folder away between the two
        try:
            with output_errors(path):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(fd, path):
                break
            os.close(fd)
        except OutputError as error:
            who = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise OutputError(
                f"{out}: another process is making it ({who or 'pid unknown'}). Wait for it, or stop it."
            ) from error
    stack.callback(os.close, fd)
    with output_errors(path):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _wipe(partial: Path) -> None:
    """Forget a half-done run, the journal last: files without a journal could not be told from a stranger's."""
    with output_errors(partial):
        for name in (_FILES, _WORK):
            if (partial / name).exists():
                shutil.rmtree(partial / name)
                fsync_folder(partial)
        for name in (_SCRATCH, _JOURNAL):
            (partial / name).unlink(missing_ok=True)
    fsync_folder(partial)


def _tidy(partial: Path) -> None:
    """Remove what is left beside a committed OUT. The lock goes last, so that nobody comes in between."""
    with output_errors(partial):
        if (partial / _WORK).exists():
            shutil.rmtree(partial / _WORK)
        for name in (_SCRATCH, _JOURNAL, _LOCK):
            (partial / name).unlink(missing_ok=True)
        try:
            os.rmdir(partial)
        except OSError as error:
            # A process that started this instant has put its lock there; it finds OUT, and removes the rest.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    fsync_folder(partial.parent)


def _intact(
    folder: Path, layouts: Sequence[ShardLayout], units: Mapping[str, Unit], verify_hashes: bool
) -> dict[str, Unit]:
    """The units whose tensors are all in `folder`, byte for byte."""
    paths = {layout.file: stored_file(folder, layout) for layout in layouts}
    places = {placed.spec.name: (paths[layout.file], placed) for layout in layouts for placed in layout.tensors}

    def holds(name: str, sha256: str) -> bool:
        path, placed = places[name]
        return path is not None and (not verify_hashes or stored_sha256(path, placed) == sha256)

    return {
        name: unit for name, unit in units.items() if all(holds(tensor, sha) for tensor, sha in unit.tensors.items())
    }
