"""What is in a checkpoint: its layout, and how every tensor is stored. From headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bitgrain.checkpoints.layouts import layout_of
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.stored import QuantizedCheckpoint


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
    """The contents of a folder, or of a model on the hub.

    Raises ModelError (no such model), CheckpointError (damaged, or quantized in a way that is not known).
    """
    source = resolve_model(model)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if layout_of(config) is None and not config.get("quantization_config"):
        entries = open_checkpoint(source.path).entries
        plain = tuple(_kept(name, one.shape, str(one.dtype), one.nbytes) for name, one in entries.items())
        return Contents(source.name, "none", plain)
    stored = QuantizedCheckpoint(source.path)
    found: list[StoredTensor] = []
    for name, original in stored.originals().items():
        layer = stored.layers.get(name)
        if layer is None:
            nbytes = stored.checkpoint.entries[name].nbytes
            found.append(_kept(name, original.shape, str(original.dtype), nbytes))
            continue
        nbytes = sum(stored.checkpoint.entries[part.name].nbytes for part in stored.layout.tensors(layer))
        inputs = layer.scheme.input
        words = layer.scheme.weight.describe(), inputs and inputs.describe()
        found.append(StoredTensor(name, tuple(original.shape), *words, nbytes, True))
    cache = stored.config.get("kv_cache_scheme")
    kept = f"{cache.get('type')}{cache.get('num_bits')} per {cache.get('strategy')}" if cache else None
    return Contents(source.name, stored.layout.name, tuple(found), kept)


def _kept(name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> StoredTensor:
    return StoredTensor(name, tuple(shape), dtype.removeprefix("torch."), None, nbytes, False)
