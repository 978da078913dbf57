"""A GGUF file seen as the transformers checkpoint that it was made of: config.json, and tensors by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.architectures import Architecture, architecture_of_file
from bitgrain.checkpoints.gguf.blocks import BlockType
from bitgrain.checkpoints.gguf.config import EXTRA_TENSORS, config_of
from bitgrain.checkpoints.gguf.container import GgufFile, open_gguf
from bitgrain.checkpoints.gguf.names import Place, originals_of
from bitgrain.checkpoints.gguf.rotary import halved_rows, interleaved_rows
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES
from bitgrain.errors import CheckpointError
from bitgrain.numerics import QTensor

SUFFIX = ".gguf"


class GgufModel:
    """A GGUF file that holds a model.

    architecture  see `architectures`
    config        what config.json says, `dtype` included: of the plain matrices where nothing is quantized, else
                  float32, in which the numbers of blocks are exact
    places        original tensor -> where it lies
    Raises CheckpointError for a damaged file, tensors or types that are not known; ModelError for the architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: GgufFile = open_gguf(path)
        where, metadata = str(path), self.file.metadata
        self.architecture: Architecture = architecture_of_file(metadata, where)
        names = [name for name in self.file.tensors if name not in EXTRA_TENSORS]
        self.places: dict[str, Place] = originals_of(names, self._experts(), self.architecture.templates)
        known = {place.name for place in self.places.values()}
        strays = [name for name in names if name not in known]
        if strays:
            more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
            raise CheckpointError(
                f"{where}: {', '.join(strays[:3])}{more}: no tensors that {self.architecture.name} has in bitgrain"
            )
        types = {tensor.type for tensor in self.file.tensors.values()}
        if unknown := sorted(types - BLOCK_TYPES.keys()):
            raise CheckpointError(
                f"{where} holds tensors of {', '.join(unknown)}; bitgrain reads {', '.join(BLOCK_TYPES)}"
            )
        for original, place in self.places.items():
            tensor, sizes = self.file.tensors[place.name], (1, 2) if place.expert is None else (3,)
            quantized = BLOCK_TYPES[tensor.type].spec is not None
            if len(tensor.shape) not in sizes or (quantized and len(self.shape(original)) != 2):
                raise CheckpointError(f"{where}: {place.name} is {tensor.type} {list(tensor.shape)}, which cannot be")
        shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        self.config: dict[str, Any] = config_of(metadata, shapes, self._plain, self.architecture, where)
        self.config["dtype"] = str(self._dtype()).removeprefix("torch.")

    def type(self, original: str) -> BlockType:
        """In what an original tensor is stored."""
        return BLOCK_TYPES[self.file.tensors[self.places[original].name].type]

    def shape(self, original: str) -> tuple[int, ...]:
        """The shape of one matrix as it is stored, [out, in], or of a vector."""
        place = self.places[original]
        shape = self.file.tensors[place.name].shape
        return shape if place.expert is None else shape[1:]

    def transposed(self, original: str) -> bool:
        """Whether transformers has it as [in, out]."""
        return self.places[original].stem in self.architecture.transposed

    def quantized(self, original: str) -> QTensor:
        """A tensor of a block type, as codes [out, in]."""
        return self.type(original).unpack(self._rows(original), self.shape(original))

    def dense(self, original: str) -> Tensor:
        """A tensor's numbers as transformers has them: float32 for block types, else in its own dtype."""
        place, shape = self.places[original], self.shape(original)
        values = self.type(original).values(self._rows(original), shape)
        if len(shape) == 1:
            order = row_order(self.architecture, self.config, place, shape[0], inverse=True)
            values = values if order is None else values[order]
            return values - 1 if is_offset(self.architecture, place) else values
        return values.T.contiguous() if self.transposed(original) else values

    def _rows(self, original: str) -> Tensor:
        """The bytes of one matrix or vector: uint8 [rows, bytes of a row], rows as transformers has them."""
        place, shape = self.places[original], self.shape(original)
        if len(shape) == 1:
            return self.file.read(place.name)
        first = 0 if place.expert is None else place.expert * shape[0]
        data = self.file.read_rows(place.name, first, first + shape[0])
        order = row_order(self.architecture, self.config, place, shape[0], inverse=True)
        return data if order is None else data[order]

    def _plain(self, name: str) -> Tensor:
        tensor = self.file.tensors[name]
        if tensor.type != "F32":
            raise CheckpointError(f"{self.path}: {name} is {tensor.type}, llama.cpp has it in F32 only")
        return BLOCK_TYPES["F32"].values(self.file.read(name), tensor.shape)

    def _experts(self) -> int:
        """Matrices in stacks of experts; every stack must have as many."""
        if not self.architecture.experts:
            return 0
        counts = {
            tensor.shape[0]
            for name, tensor in self.file.tensors.items()
            if name.endswith("_exps.weight") and tensor.shape
        }
        told = self.file.metadata.get(f"{self.architecture.name}.{self.architecture.experts}")
        if not isinstance(told, int) or counts != {told}:
            raise CheckpointError(f"{self.path}: {told} experts in the metadata, {sorted(counts)} in the tensors")
        return told

    def _dtype(self) -> torch.dtype:
        matrices = [BLOCK_TYPES[tensor.type] for tensor in self.file.tensors.values() if len(tensor.shape) > 1]
        dtypes = Counter(one.dtype for one in matrices)
        if None in dtypes or not dtypes:
            return torch.float32
        return dtypes.most_common(1)[0][0] or torch.float32


def row_order(
    architecture: Architecture, config: Mapping[str, Any], place: Place, rows: int, *, inverse: bool
) -> Tensor | None:
    """int64 [rows]: which of transformers' rows each row of the GGUF tensor is (`inverse`: the other way round); None
    where they are the same. Raises CheckpointError for rows that are no heads."""
    part = place.stem.partition(".")[0]
    if not architecture.interleaved or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    try:
        return halved_rows(rows, heads) if inverse else interleaved_rows(rows, heads)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{place.name}: {error}") from error


def is_offset(architecture: Architecture, place: Place) -> bool:
    """Whether the GGUF tensor is one more than transformers' (Gemma's norms)."""
    return architecture.norm_offset and place.stem.endswith("norm.weight")
