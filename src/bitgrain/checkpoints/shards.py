"""Where every output byte goes, known before the first one is written.

Tensors are dealt out to shards in the caller's order; inside a shard they lie in the canonical safetensors
order (element width descending, then name), so that each is aligned to its element size in the file, which
readers that map files rely on. One shard is byte for byte what `safetensors.torch.save` would give.
Index: `{"metadata": {"total_size"}, "weight_map": {tensor: file}}`, as huggingface_hub writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from bitgrain.checkpoints.reader import SINGLE_FILE
from bitgrain.checkpoints.safetensors_header import (
    DTYPE_NAMES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    build_header,
    is_unicode,
    layout_key,
    shape_nbytes,
)
from bitgrain.errors import PlanError

_PT: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come: its name, dtype and shape. any_size: that of another writer may be longer or shorter (text);
    optional: readers do without it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    any_size: bool = False
    optional: bool = field(default=False, compare=False)

    @property
    def nbytes(self) -> int:
        return shape_nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and the byte of its shard's file at which it begins."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class ShardLayout:
    """One file to come: `header` are its first bytes as they are; `nbytes` is its whole length; `padding` bytes of it,
    zeros, belong to no tensor."""

    file: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]
    padding: int = 0

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.spec.nbytes for tensor in self.tensors) + self.padding


def plan_shards(
    tensors: Sequence[TensorSpec], max_shard_bytes: int, metadata: Mapping[str, str] = _PT
) -> tuple[ShardLayout, ...]:
    """Deal `tensors` out to shards of at most `max_shard_bytes` bytes of tensors (headers not counted).

    Greedy, in the given order; a tensor that is larger than the limit gets a shard of its own. Files are
    `model.safetensors`, or `model-00001-of-0000N.safetensors` when there are several.

    Raises PlanError for no tensors, a limit below 1, a repeated or unusable name, a dtype that safetensors lacks,
    or a header over the format's limit.
    """
    if max_shard_bytes < 1:
        raise PlanError(f"The shard size is {max_shard_bytes} bytes. Ask for at least 1.")
    if not tensors:
        raise PlanError("There are no tensors to write. Check that the model folder holds weights.")
    _check(tensors, metadata)
    groups: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for spec in tensors:
        if spec.nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    count = len(groups)
    return tuple(
        _lay_out(
            SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors",
            group,
            metadata,
        )
        for number, group in enumerate(groups, 1)
    )


def index_bytes(layouts: Sequence[ShardLayout]) -> bytes | None:
    """The bytes of `model.safetensors.index.json`; None when one shard needs no index."""
    if len(layouts) == 1:
        return None
    weight_map = {placed.spec.name: layout.file for layout in layouts for placed in layout.tensors}
    total = sum(placed.spec.nbytes for layout in layouts for placed in layout.tensors)
    table: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def weights_nbytes(layouts: Sequence[ShardLayout]) -> int:
    """Bytes on disk of all weight files and their index."""
    return sum(layout.nbytes for layout in layouts) + len(index_bytes(layouts) or b"")


def layouts_sha256(layouts: Sequence[ShardLayout]) -> str:
    """Hex digest of every file name and header: two plans with one digest put each byte in the same place."""
    digest = hashlib.sha256()
    for layout in layouts:
        digest.update(f"{layout.file}\0{len(layout.header)}\0".encode() + layout.header)
    return digest.hexdigest()


def _check(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    seen: set[str] = set()
    for spec in tensors:
        if spec.name in seen:
            raise PlanError(f"Two output tensors are named {spec.name!r}. Rename one of them.")
        if spec.name in (METADATA_KEY, "") or not is_unicode(spec.name):
            raise PlanError(f"A tensor cannot be named {spec.name!r} in a safetensors file. Rename it.")
        if spec.dtype not in DTYPE_NAMES:
            raise PlanError(f"{spec.name}: safetensors cannot hold {spec.dtype}. Store it in another dtype.")
        seen.add(spec.name)
    for key, value in metadata.items():
        if not (is_unicode(key) and is_unicode(value)):
            raise PlanError(f"The shard metadata {key!r} is not Unicode text. Correct it.")


def _lay_out(file: str, group: Sequence[TensorSpec], metadata: Mapping[str, str]) -> ShardLayout:
    ordered = sorted(group, key=lambda spec: layout_key(spec.name, spec.dtype))
    header = build_header([(spec.name, spec.dtype, tuple(spec.shape)) for spec in ordered], metadata)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise PlanError(
            f"{file}: its header would take {len(header)} bytes, over the format's limit of {MAX_HEADER_BYTES}. "
            "Ask for smaller shards."
        )
    placed: list[PlacedTensor] = []
    position = len(header)
    for spec in ordered:
        placed.append(PlacedTensor(spec, position))
        position += spec.nbytes
    return ShardLayout(file, header, tuple(placed))
