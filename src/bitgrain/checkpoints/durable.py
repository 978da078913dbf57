"""What it takes for bytes to survive a crash: one place for fsync, whole writes and atomic replacement.

A file's bytes are safe once the file is fsynced; its *name* is safe once its folder is (POSIX `fsync(2)`).
Nothing here catches an error for good: an `OSError` leaves as an `OutputError` that names the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from bitgrain.errors import OutputError

# Linux moves at most 0x7ffff000 bytes a call; half of that keeps slices round.
_MOST_BYTES_A_CALL = 1 << 30
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def output_errors(path: Path) -> Generator[None, None, None]:
    """Turn an `OSError` of the body into an `OutputError` that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in _FULL:
            remedy = "free some space and run the same command again: finished work is kept"
        elif error.errno == errno.EMFILE:
            remedy = "raise the limit on open files (ulimit -n) or use larger shards"
        else:
            remedy = "check the disk and the permissions, then run the same command again"
        raise OutputError(f"{path}: cannot be written ({why}). {remedy[0].upper()}{remedy[1:]}.") from error


def fsync_file(path: Path) -> None:
    """Flush a file's bytes to the disk. Raises OutputError."""
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def fsync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk. Raises OutputError."""
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and FUSE file systems have no fsync for folders: there the rename alone must do.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, deepest first. Raises OutputError."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in sorted(files):
            path = Path(where, name)
            if path.is_file() and not path.is_symlink():
                fsync_file(path)
        fsync_folder(Path(where))


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however many calls it takes. Raises OSError."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _MOST_BYTES_A_CALL], offset + done)


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` (uint8) from `offset`; returns the bytes read, fewer only where the file ends. Raises OSError."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done : done + _MOST_BYTES_A_CALL]], offset + done)
        if got == 0:
            break
        done += got
    return done


def replace_file(path: Path, data: bytes, scratch: Path) -> None:
    """Make `path` hold `data`, whole or not at all: written to `scratch`, fsynced, renamed, folder fsynced.

    `scratch` is a path on the same file system; a killed run leaves its litter there and never beside `path`.
    Raises OutputError.
    """
    with output_errors(path):
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            pwrite_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(scratch, path)
    fsync_folder(path.parent)
