"""What is in a checkpoint: its layout, and how every tensor is stored. From headers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitgrain.checkpoints.onnx.reader import OnnxFile
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.stored import open_stored


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the original checkpoint.

    shape   as the original has it; weight, input: how it is stored and how its layer's inputs are quantized, in words
            (`QuantSpec.describe`); the dtype where it is kept, and None
    nbytes  on disk, scales and all
    """

    name: str
    shape: tuple[int, ...]
    weight: str
    input: str | None
    nbytes: int
    quantized: bool

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits(self) -> float:
        """Stored bits an element."""
        return 8 * self.nbytes / max(1, self.elements)


@dataclass(frozen=True)
class Contents:
    """What `read_contents` found. layout: its name, "none" for a checkpoint that is not quantized; kv_cache: how keys
    and values are kept, where that is told."""

    name: str
    layout: str
    tensors: tuple[StoredTensor, ...]
    kv_cache: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized tensors, scales and all; None where there are none."""
        quantized = [tensor for tensor in self.tensors if tensor.quantized]
        elements = sum(tensor.elements for tensor in quantized)
        return 8 * sum(tensor.nbytes for tensor in quantized) / elements if elements else None

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / max(1, sum(tensor.elements for tensor in self.tensors))


def read_contents(model: str | Path) -> Contents:
    """The contents of a folder (of safetensors or ONNX), a GGUF file, or a model on the hub.

    Raises ModelError (no such model), CheckpointError (damaged, or quantized in a way that is not known).
    """
    if (graph := Path(model) / "model.onnx").is_file():
        return _onnx_contents(graph)
    source = resolve_model(model, gguf=True)
    stored = open_stored(source.path)
    found: list[StoredTensor] = []
    for name, original in stored.originals().items():
        layer, nbytes = stored.layers.get(name), stored.nbytes(name)
        if layer is None:
            found.append(_kept(name, original.shape, str(original.dtype), nbytes))
            continue
        inputs = layer.scheme.input
        words = layer.scheme.weight.describe(), inputs and inputs.describe()
        found.append(StoredTensor(name, tuple(original.shape), *words, nbytes, True))
    cache = stored.config.get("kv_cache_scheme")
    kept = f"{cache.get('type')}{cache.get('num_bits')} per {cache.get('strategy')}" if cache else None
    return Contents(source.name, stored.kind if stored.layers else "none", tuple(found), kept)


def _onnx_contents(graph: Path) -> Contents:
    """Of an ONNX file; sizes are those of codes, scales and zero points, packed."""
    file = OnnxFile(graph)
    found = [
        StoredTensor(name, one.shape, one.spec.describe(), None, -(-one.spec.count_bits(one.shape) // 8), True)
        for name, one in file.matrices.items()
    ]
    for name, (shape, dtype) in file.kept().items():
        width = _WIDTHS.get(dtype, 4)
        found.append(_kept(name, shape, dtype, math.prod(shape) * width))
    return Contents(graph.parent.name, "onnx", tuple(found))


_WIDTHS = {"float16": 2, "bfloat16": 2, "int64": 8, "double": 8, "int8": 1, "uint8": 1, "bool": 1}
"""Bytes of an element of ONNX's types; four of the others."""


def _kept(name: str, shape: Sequence[int], dtype: str, nbytes: int) -> StoredTensor:
    return StoredTensor(name, tuple(shape), dtype.removeprefix("torch."), None, nbytes, False)
