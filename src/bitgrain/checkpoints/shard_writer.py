"""Tensors out: each at its planned byte, in any order, from any thread.

A file is made at its full size and under the name `<final>.part`, header first; it takes its final name only
once every tensor is in it and fsynced. What a killed run left is taken over as it is: writing again is harmless.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import torch

from bitgrain.checkpoints.durable import fsync_folder, output_errors, pread_into, pwrite_all, replace_file
from bitgrain.checkpoints.reader import INDEX_FILE
from bitgrain.checkpoints.shards import PlacedTensor, ShardLayout, index_bytes

PART = ".part"
_HASH_CHUNK = 8 << 20


class ShardWriter:
    """Writes the files of `layouts` into `folder` (which exists).

    `written` names tensors whose bytes are there already, from an earlier run; they count as written.
    A wrong name, dtype or shape is a bug of the caller: ValueError. Failing disks raise OutputError.
    """

    def __init__(self, folder: Path, layouts: Sequence[ShardLayout], written: Iterable[str] = ()) -> None:
        self._folder = folder
        self._layouts = tuple(layouts)
        self._place: dict[str, tuple[int, PlacedTensor]] = {
            placed.spec.name: (number, placed)
            for number, layout in enumerate(self._layouts)
            for placed in layout.tensors
        }
        self._written = set(written)
        if not self._written <= self._place.keys():
            raise ValueError(f"not in the layout: {sorted(self._written - self._place.keys())[:3]}")
        self._lock = Lock()
        self._fds: list[int] = []
        try:
            for layout in self._layouts:
                self._fds.append(self._create(layout))
        except BaseException:
            self.close()
            raise
        fsync_folder(folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, tensor: torch.Tensor) -> memoryview:
        """Write `tensor` (dtype and shape as planned) and return the bytes that were written.

        A tensor that is not contiguous, or not on the CPU, is copied first. Not durable before `sync`.
        Raises ValueError for an unknown name, a second write, or another dtype or shape than planned.
        """
        number, placed = self._planned(name)
        spec = placed.spec
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != tuple(spec.shape):
            raise ValueError(
                f"{name!r} is planned as {spec.dtype} {tuple(spec.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        with self._lock:
            if name in self._written:
                raise ValueError(f"{name!r} is written already")
            self._written.add(name)
        data = tensor_bytes(tensor)
        try:
            with output_errors(self._part(number)):
                pwrite_all(self._fds[number], data, placed.offset)
        except BaseException:
            with self._lock:
                self._written.discard(name)
            raise
        return data

    def sync(self, names: Iterable[str]) -> None:
        """Make the bytes of `names` durable: fsync of each file that holds one of them."""
        self._sync_files(sorted({self._planned(name)[0] for name in names}))

    def finish(self) -> None:
        """Fsync all, give every file its final name, write the index. The writer is closed afterwards.

        Raises ValueError when a tensor was never written.
        """
        missing = sorted(self._place.keys() - self._written)
        if missing:
            raise ValueError(f"{len(missing)} planned tensors were never written: {missing[:3]}")
        self._sync_files(range(len(self._layouts)))
        self.close()
        for number, layout in enumerate(self._layouts):
            with output_errors(self._folder / layout.file):
                os.replace(self._part(number), self._folder / layout.file)
        index = index_bytes(self._layouts)
        if index is not None:
            replace_file(self._folder / INDEX_FILE, index, self._folder / (INDEX_FILE + PART))
        fsync_folder(self._folder)

    def close(self) -> None:
        """Close the files as they are; nothing is renamed or removed."""
        while self._fds:
            os.close(self._fds.pop())

    def _planned(self, name: str) -> tuple[int, PlacedTensor]:
        if name not in self._place:
            raise ValueError(f"{name!r} is not in the layout")
        return self._place[name]

    def _part(self, number: int) -> Path:
        return self._folder / (self._layouts[number].file + PART)

    def _sync_files(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with output_errors(self._part(number)):
                os.fsync(self._fds[number])

    def _create(self, layout: ShardLayout) -> int:
        """Open the .part at full size, header in place; a file that a run killed while finishing had renamed
        goes back to .part, so that a final name always means a whole file."""
        final, part = self._folder / layout.file, self._folder / (layout.file + PART)
        with output_errors(part):
            if final.exists() and not part.exists():
                os.replace(final, part)
            fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(fd).st_size != layout.nbytes:
                    os.ftruncate(fd, layout.nbytes)
                _allocate(fd, layout.nbytes)
                pwrite_all(fd, layout.header, 0)
            except BaseException:
                os.close(fd)
                raise
        return fd


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a view where it is contiguous and on the CPU, else of a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one element may have any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def stored_file(folder: Path, layout: ShardLayout) -> Path | None:
    """The layout's file under either name, if it has the planned size and header; None otherwise."""
    for path in (folder / (layout.file + PART), folder / layout.file):
        if path.is_file():
            with output_errors(path), path.open("rb") as file:
                sound = os.fstat(file.fileno()).st_size == layout.nbytes
                return path if sound and file.read(len(layout.header)) == layout.header else None
    return None


def stored_sha256(path: Path, placed: PlacedTensor) -> str:
    """sha256 (hex) of a planned tensor's bytes as they are in `path` now. Raises OutputError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_HASH_CHUNK, placed.spec.nbytes)))
    with output_errors(path), path.open("rb", buffering=0) as file:
        for start in range(0, placed.spec.nbytes, _HASH_CHUNK):
            piece = buffer[: min(_HASH_CHUNK, placed.spec.nbytes - start)]
            digest.update(piece[: pread_into(file.fileno(), piece, placed.offset + start)])
    return digest.hexdigest()


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the disk blocks now, where the system can: no surprise halfway through a long job."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
