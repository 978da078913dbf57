"""Reading GGUF files: the header is parsed strictly, tensors are read one at a time and never mapped into memory.

Format: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3, little-endian. Where it leaves room, what
llama.cpp reads is what is read here; beyond it, arrays may be nested and there may be holes between tensors.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from bitgrain.checkpoints.durable import pread_into
from bitgrain.checkpoints.gguf.cursor import Cursor, unsound
from bitgrain.checkpoints.gguf.storage import BY_NUMBER, STORAGES
from bitgrain.checkpoints.gguf.values import Value
from bitgrain.checkpoints.reader import opened
from bitgrain.errors import CheckpointError
from bitgrain.numerics.granularity import matrix_shape

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MOST_ENTRIES = 1 << 16
"""Tensors, and keys, that a file may have: an entry takes more memory than its bytes in the file."""

_GIT_LFS = b"version "
_MOST_BYTES = 1 << 63


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of the file.

    type   name of ggml's type, such as "Q4_K"
    shape  in torch's order, rows first
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows, and bytes of each."""
        rows, cols = matrix_shape(self.shape)
        return rows, STORAGES[self.type].row_bytes(cols) or 0


class GgufFile:
    """An open GGUF file. Build with `open_gguf`. Reads are thread-safe and share nothing.

    metadata  by key: str, int, float, bool, or a sequence of those (long ones as they are in the file)
    kinds     by key: how the value was stored (`values`), so that it can be written again as it was
    tensors   by name, in the file's order
    """

    def __init__(
        self, path: Path, version: int, values: Mapping[str, tuple[str, Value]], tensors: Mapping[str, GgufTensor]
    ) -> None:
        self.path, self.version = path, version
        self.metadata: Mapping[str, Value] = MappingProxyType({key: value for key, (_, value) in values.items()})
        self.kinds: Mapping[str, str] = MappingProxyType({key: kind for key, (kind, _) in values.items()})
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(dict(tensors))
        self._state = _state(os.stat(path))

    def read(self, name: str) -> torch.Tensor:
        """The tensor's bytes: uint8 [rows, bytes of a row], on CPU, with storage of its own.

        Raises CheckpointError for an unknown name, a file that changed since it was opened, or a failed read.
        """
        return self.read_rows(name, 0, self._tensor(name).matrix[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of it, seen as a matrix. Raises IndexError unless 0 <= start <= stop <= rows."""
        tensor = self._tensor(name)
        rows, width = tensor.matrix
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {rows}")
        data = torch.empty(stop - start, width, dtype=torch.uint8)
        if data.numel() == 0:
            return data
        with opened(self.path) as fd:
            got = pread_into(fd, data.view(-1).numpy().data, tensor.offset + start * width)
            now = _state(os.fstat(fd))
        if got < data.numel() or now != self._state:
            raise CheckpointError(
                f"{self.path}: changed while it was being read ({name!r}: {got} of {data.numel()} bytes). "
                "Let no other program write to the file, and start again."
            )
        return data

    def _tensor(self, name: str) -> GgufTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in this file.{hint}")
        return tensor


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file: only its header is read.

    Raises CheckpointError for a file that is missing or not sound: wrong magic or version, big-endian, counts, lengths
    or tensors that go beyond the file, unknown types, overlaps, duplicates, text that is not UTF-8.
    """
    with opened(path) as fd:
        cursor = Cursor(fd, os.fstat(fd).st_size, str(path))
        version = _version(cursor)
        counts = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
        for count, what in zip(counts, ("tensors", "keys"), strict=True):
            if count > MOST_ENTRIES:
                raise unsound(cursor.label, f"it claims {count} {what}, and {MOST_ENTRIES} is the most that is read")
        values: dict[str, tuple[str, Value]] = {}
        for _ in range(counts[1]):
            key = cursor.text("a key")
            if not key or key in values:
                raise unsound(cursor.label, f"the key {key[:80]!r} is there twice" if key else "a key is empty")
            values[key] = cursor.value(key)
        alignment = _alignment(values, cursor.label)
        tensors = _tensors(cursor, counts[0], alignment)
    return GgufFile(path, version, values, tensors)


def _version(cursor: Cursor) -> int:
    first = cursor.peek(8)
    if first == _GIT_LFS:
        raise CheckpointError(f"{cursor.label}: this is a Git LFS pointer, not the weights. Run `git lfs pull` there.")
    if first[:4] != MAGIC:
        raise unsound(cursor.label, f"it begins with {first[:4]!r} and not with {MAGIC!r}")
    cursor.number("I", "the magic")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{cursor.label}: a big-endian GGUF file, which is not read here. Make a little-endian one, "
            "for example with gguf_convert_endian.py of the gguf package."
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{cursor.label}: GGUF version {version}; versions 2 and 3 can be read. Convert the model again with a "
            "current llama.cpp."
        )
    return version


def _alignment(values: Mapping[str, tuple[str, Value]], label: str) -> int:
    kind, alignment = values.get(ALIGNMENT_KEY, ("uint32", DEFAULT_ALIGNMENT))
    if kind != "uint32" or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise unsound(label, f"its alignment is {alignment!r} ({kind}), not a power of two in uint32")
    return alignment


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for _ in range(count):
        tensor = _tensor(cursor, alignment)
        if tensor.name in found:
            raise unsound(cursor.label, f"tensor {tensor.name!r} is there twice")
        found[tensor.name] = tensor
    start = cursor.position + -cursor.position % alignment
    placed = {
        name: GgufTensor(name, tensor.type, tensor.shape, start + tensor.offset, tensor.nbytes)
        for name, tensor in found.items()
    }
    end, before = start, None
    for tensor in sorted(placed.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.nbytes == 0:
            continue
        if tensor.offset < end:
            raise unsound(cursor.label, f"tensor {tensor.name!r} overlaps {before!r}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if end > cursor.size and before is not None:  # a name may be empty
        raise CheckpointError(
            f"{cursor.label}: truncated, it has {cursor.size} of the {end} bytes that its header describes. "
            "Download or copy it again."
        )
    return placed


def _tensor(cursor: Cursor, alignment: int) -> GgufTensor:
    """One entry of the header; its offset still counts from the start of the tensors' bytes."""
    name = cursor.text("a tensor's name")
    rank = cursor.number("I", f"the rank of {name!r}")
    if rank > MAX_DIMENSIONS:
        raise unsound(cursor.label, f"tensor {name!r} has {rank} dimensions, and {MAX_DIMENSIONS} is the limit")
    shape = tuple(reversed([cursor.number("Q", f"the shape of {name!r}") for _ in range(rank)]))
    storage = BY_NUMBER.get(number := cursor.number("I", f"the type of {name!r}"))
    if storage is None:
        raise CheckpointError(f"{cursor.label}: tensor {name!r} has type {number}, which is not known here.")
    offset = cursor.number("Q", f"the offset of {name!r}")
    # Zero sizes count as one here: an empty tensor's strides must fit 64 bits too.
    if math.prod(max(size, 1) for size in shape) * storage.nbytes >= _MOST_BYTES:
        raise unsound(cursor.label, f"tensor {name!r} has an impossible shape")
    if offset % alignment:
        raise unsound(cursor.label, f"tensor {name!r} begins at {offset}, which {alignment} does not divide")
    rows, cols = matrix_shape(shape)
    width = storage.row_bytes(cols)
    if width is None:
        raise unsound(cursor.label, f"tensor {name!r} has rows of {cols}, which are not blocks of {storage.size}")
    return GgufTensor(name, storage.name, shape, offset, rows * width)


def _state(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ino
