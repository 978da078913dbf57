"""Weights in: a checkpoint's tensors, read one at a time from safetensors files, never mapped into memory.

Opening parses headers only. Each read is a `pread` into a buffer of its own, because pages of a mapped file
count into the process's resident memory, which a job disk-to-disk promises to bound. Format: see
`safetensors_header`; the index (`model.safetensors.index.json`, `{"weight_map": {tensor: file}}`) is that of
huggingface_hub's `save_torch_state_dict`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bitgrain.checkpoints.durable import pread_into
from bitgrain.checkpoints.safetensors_header import Header, header_length, parse_header, strict_json
from bitgrain.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of `file` (a name inside the checkpoint's folder)."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _SourceFile:
    path: Path
    header: Header
    header_sha256: str
    inode: int
    size: int
    mtime_ns: int


class Checkpoint:
    """The tensors of one folder. Build with `open_checkpoint`. Reads are thread-safe and share nothing."""

    def __init__(self, folder: Path, files: Mapping[str, _SourceFile], index_sha256: str | None) -> None:
        self.folder = folder
        self._files = dict(files)
        self._index_sha256 = index_sha256
        self._entries: Mapping[str, StoredTensor] = MappingProxyType(
            {
                entry.name: StoredTensor(entry.name, file, entry.dtype, entry.shape, entry.offset, entry.nbytes)
                for file, source in sorted(self._files.items())
                for entry in source.header.entries
            }
        )

    @property
    def entries(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, in the order of file name, then offset. Read-only."""
        return self._entries

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, sorted."""
        return tuple(sorted(self._files))

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """`__metadata__` of each file, by file name."""
        return {name: dict(source.header.metadata) for name, source in sorted(self._files.items())}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on CPU, contiguous, with storage of its own: stored dtype and shape.

        Raises CheckpointError for an unknown name, a file that changed since it was opened, or a failed read.
        """
        entry = self._entry(name)
        return self._read_bytes(entry, 0, entry.nbytes, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0: shape `(stop - start, *shape[1:])`, as `read` otherwise.

        Raises IndexError unless the tensor has a dimension 0 and `0 <= start <= stop <= shape[0]`.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, whose shape is {entry.shape}")
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read_bytes(entry, start * row, (stop - start) * row, (stop - start, *entry.shape[1:]))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these sources to a resumed job: JSON-ready, with no path of the machine.

        `{"files": {name: {"size", "mtime_ns", "header_sha256"}}, "index_sha256": str | None}`.
        """
        files = {
            name: {"size": source.size, "mtime_ns": source.mtime_ns, "header_sha256": source.header_sha256}
            for name, source in sorted(self._files.items())
        }
        return {"files": files, "index_sha256": self._index_sha256}

    def _entry(self, name: str) -> StoredTensor:
        entry = self._entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._entries, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r} in this checkpoint.{hint}")
        return entry

    def _read_bytes(self, entry: StoredTensor, skip: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=entry.dtype)
        source = self._files[entry.file]
        raw = torch.empty(nbytes, dtype=torch.uint8)
        with opened(source.path) as fd:
            got = pread_into(fd, raw.numpy().data, entry.offset + skip)
            now = os.fstat(fd)
        if got < nbytes or (now.st_size, now.st_mtime_ns, now.st_ino) != (source.size, source.mtime_ns, source.inode):
            raise CheckpointError(
                f"{source.path}: changed while it was being read ({entry.name!r}: {got} of {nbytes} bytes). "
                "Let no other program write to the checkpoint, and start again."
            )
        return raw.view(entry.dtype).view(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the safetensors weights in `folder`: headers only, no tensor is read.

    In this order, as transformers: `model.safetensors`, else the files that `model.safetensors.index.json`
    names, else the only `*.safetensors` there is. A weight file may be a symlink (hub caches are made of them),
    but its name must lie in the folder itself.

    Raises CheckpointError, naming the file and the remedy, when a file is missing, truncated, corrupt or
    disagrees with the index.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Name the folder that holds the model's files.")
    index = folder / INDEX_FILE
    weight_map: dict[str, str] | None = None
    index_sha256 = None
    if (folder / SINGLE_FILE).exists() or (folder / SINGLE_FILE).is_symlink():
        names = [SINGLE_FILE]
    elif index.exists() or index.is_symlink():
        data = _read_whole(index)
        index_sha256 = hashlib.sha256(data).hexdigest()
        weight_map = _parse_index(data, index)
        names = sorted(set(weight_map.values()))
        _require_shards(folder, names)
    else:
        names = [_only_file(folder)]
    files = {name: _open_file(folder / name) for name in names}
    _check_owners(folder, files, weight_map)
    return Checkpoint(folder, files, index_sha256)


def _only_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files ({found[0]}, ...) but no {INDEX_FILE}. "
            "Download the index as well."
        )
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
    hint = f" It holds {others[0]}: convert the weights to safetensors first." if others else ""
    raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE} in this folder.{hint}")


def _parse_index(data: bytes, index: Path) -> dict[str, str]:
    try:
        table = strict_json(data)
    except ValueError as error:
        raise CheckpointError(f"{index}: not valid JSON: {error}. Download it again.") from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files. Download it again.")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0:")
        if not plain:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} names the file {file!r}, but only *.safetensors files in the index's "
                "own folder are read. Do not trust this checkpoint, or correct its index."
            )
    return weight_map


def _require_shards(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} names {', '.join(missing[:3])}{more}, missing here. Download again to complete it."
        )


def _check_owners(folder: Path, files: Mapping[str, _SourceFile], weight_map: Mapping[str, str] | None) -> None:
    """Each tensor is in exactly one file: the one that the index names."""
    owner: dict[str, str] = {}
    for file, source in files.items():
        for entry in source.header.entries:
            if entry.name in owner:
                raise CheckpointError(
                    f"{folder / file}: tensor {entry.name!r} is in {owner[entry.name]} too. "
                    "Remove one of the two, or download the checkpoint again."
                )
            owner[entry.name] = file
    if weight_map is None:
        return
    for tensor, file in weight_map.items():
        if owner.get(tensor) != file:
            found = f"it is in {owner[tensor]}" if tensor in owner else "it is in no file"
            raise CheckpointError(
                f"{folder / file}: has no tensor {tensor!r}, which {INDEX_FILE} says is there; {found}. "
                "The index and the shards are from different versions: download them again together."
            )
    for tensor, file in owner.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{folder / file}: holds tensor {tensor!r}, which {INDEX_FILE} does not name. "
                "The index and the shards are from different versions: download them again together."
            )


def _open_file(path: Path) -> _SourceFile:
    with opened(path) as fd:
        info = os.fstat(fd)
        label = str(path)
        first = os.pread(fd, 8, 0)
        length = header_length(first, info.st_size, label)
        buffer = bytearray(length)
        if pread_into(fd, memoryview(buffer), 8) < length:
            raise CheckpointError(f"{path}: changed while it was being read. Start again when it is complete.")
    text = bytes(buffer)
    header = parse_header(text, info.st_size, label)
    digest = hashlib.sha256(first + text).hexdigest()
    return _SourceFile(path, header, digest, info.st_ino, info.st_size, info.st_mtime_ns)


def _read_whole(path: Path) -> bytes:
    with opened(path) as fd, open(fd, "rb", closefd=False) as file:
        return file.read()


@contextmanager
def opened(path: Path) -> Generator[int, None, None]:
    """A read-only descriptor of a regular file; an `OSError` of the body becomes a CheckpointError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # non-blocking: opening a pipe must not hang
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path}: not a regular file. Put the weight file itself there.")
            yield fd
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, or a link to a file that is not there. Download it again.") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the disk and the file's permissions."
        ) from error
