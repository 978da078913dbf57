"""Writing GGUF files: every byte's place is known before the first one is written.

Version 3, little-endian; keys and tensors in the given order; each tensor padded to the alignment, as llama.cpp wants.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitgrain.checkpoints.durable import output_errors
from bitgrain.checkpoints.gguf.container import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MOST_ENTRIES,
    GgufTensor,
)
from bitgrain.checkpoints.gguf.cursor import MAX_HEADER_BYTES
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.checkpoints.gguf.values import Value, encode_string, encode_value
from bitgrain.checkpoints.shard_writer import PART, ShardWriter
from bitgrain.checkpoints.shards import PlacedTensor, ShardLayout, TensorSpec
from bitgrain.errors import OutputError, PlanError
from bitgrain.numerics.granularity import matrix_shape

MAX_NAME_BYTES = 63
"""The longest tensor name that llama.cpp reads (GGML_MAX_NAME - 1)."""


@dataclass(frozen=True)
class GgufPlan:
    """A file to come: `header` are its first bytes as they are; `nbytes` is its whole length."""

    header: bytes
    tensors: tuple[GgufTensor, ...]
    nbytes: int

    def layout(self, file: str) -> ShardLayout:
        """The same for `ShardWriter`, which can also go on after it was killed: each tensor is uint8 [rows, bytes of a
        row]."""
        placed = tuple(
            PlacedTensor(TensorSpec(tensor.name, torch.uint8, tensor.matrix), tensor.offset) for tensor in self.tensors
        )
        used = len(self.header) + sum(tensor.nbytes for tensor in self.tensors)
        return ShardLayout(file, self.header, placed, self.nbytes - used)


def plan_gguf(
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    alignment: int = DEFAULT_ALIGNMENT,
    kinds: Mapping[str, str] | None = None,
) -> GgufPlan:
    """Where every byte of a file goes.

    metadata  by key; `kinds` says for some keys how they are stored (see `values.encode_value` for the others)
    tensors   name, type ("Q4_K") and shape (torch's order) of each
    Raises PlanError for what GGUF or llama.cpp does not take: values without a kind, names twice or too long, unknown
    types, rows that are not whole blocks, over 4 dimensions.
    """
    if alignment < 1 or alignment & (alignment - 1):
        raise PlanError(f"The alignment is {alignment}. Ask for a power of two.")
    values = dict(metadata)
    if values.get(ALIGNMENT_KEY, alignment) != alignment:
        raise PlanError(
            f"{ALIGNMENT_KEY} is {values[ALIGNMENT_KEY]}, but the alignment is {alignment}. Drop one of both."
        )
    if alignment != DEFAULT_ALIGNMENT:
        values[ALIGNMENT_KEY] = alignment
    if len(values) > MOST_ENTRIES or len(tensors) > MOST_ENTRIES:
        raise PlanError(f"{len(values)} keys and {len(tensors)} tensors: {MOST_ENTRIES} of each fit in a file.")
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_name(key, 65535), encode_value(key, value, (kinds or {}).get(key))]
    position, placed = 0, list[GgufTensor]()
    for name, type_name, shape in tensors:
        nbytes = _nbytes(name, type_name, shape)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_name(name, MAX_NAME_BYTES), sizes, struct.pack("<IQ", STORAGES[type_name].number, position)]
        placed.append(GgufTensor(name, type_name, tuple(shape), position, nbytes))
        position += nbytes + -nbytes % alignment
    if len({tensor.name for tensor in placed}) < len(placed):
        raise PlanError("Two tensors of a GGUF file have the same name. Rename one of them.")
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    if len(header) > MAX_HEADER_BYTES:
        raise PlanError(f"The header would take {len(header)} bytes; {MAX_HEADER_BYTES} is the limit. Drop metadata.")
    start = len(header)
    moved = tuple(GgufTensor(t.name, t.type, t.shape, start + t.offset, t.nbytes) for t in placed)
    return GgufPlan(header, moved, start + position)


class GgufWriter:
    """Writes the file of `plan`, as `<path>.part` until `finish`. What an earlier run left under that name is removed.

    Raises OutputError where `path` exists, or a disk fails.
    """

    def __init__(self, path: Path, plan: GgufPlan) -> None:
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path}: exists already. Choose another name, or remove it.")
        part = path.with_name(path.name + PART)
        with output_errors(part):
            part.unlink(missing_ok=True)
        self._writer = ShardWriter(path.parent, [plan.layout(path.name)])

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, name: str, data: torch.Tensor) -> None:
        """Write a tensor, uint8 [rows, bytes of a row] as planned, from any thread.

        Raises ValueError for an unknown name, a second write, or another shape or dtype.
        """
        self._writer.write(name, data)

    def finish(self) -> None:
        """Make the file durable and give it its name. Raises ValueError when a tensor was never written."""
        self._writer.finish()


def _name(text: str, longest: int) -> bytes:
    try:
        data = encode_string(text)
    except UnicodeEncodeError as error:
        raise PlanError(f"{text!r} is not Unicode text, and cannot be a name in a GGUF file. Rename it.") from error
    if not 0 < len(data) - 8 <= longest:
        raise PlanError(f"{text[:80]!r} has {len(data) - 8} bytes: names in GGUF have 1 to {longest}. Rename it.")
    return data


def _nbytes(name: str, type_name: str, shape: tuple[int, ...]) -> int:
    storage = STORAGES.get(type_name)
    if storage is None:
        raise PlanError(f"{name}: unknown GGUF type {type_name!r}; known types: {', '.join(STORAGES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise PlanError(f"{name}: GGUF has tensors of at most {MAX_DIMENSIONS} dimensions, not {len(shape)}.")
    rows, cols = matrix_shape(shape)
    width = storage.row_bytes(cols)
    if width is None:
        raise PlanError(
            f"{name}: rows of {cols} are not whole blocks of {storage.size}, as {type_name} needs. "
            "Give it a type of smaller blocks."
        )
    return rows * width
