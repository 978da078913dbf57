"""A quantized checkpoint under its original names, whatever its layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.kv_scales import SUFFIXES, read_scheme
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS, layout_of
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.checkpoints.settings import read_settings, section
from bitgrain.errors import CheckpointError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.naming import natural_order
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QTensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.pipeline.cache_plan import stored_cache
from bitgrain.runtime.kv_cache import CacheScheme


class QuantizedCheckpoint:
    """A quantized checkpoint as its original names: which layers are quantized, and every tensor dequantized.

    Raises CheckpointError for a folder that holds no quantized checkpoint that bitgrain can read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        config = read_settings(folder)
        layout = layout_of(config)
        if layout is None:
            method = section(config).get("quant_method")
            what = f"is quantized with {method}" if method else "is not quantized"
            raise CheckpointError(f"{folder} {what}; bitgrain reads the layouts {', '.join(LAYOUTS)}")
        self.layout: Layout = layout
        self.config: dict[str, Any] = dict(section(config, layout.keys[0]))
        self.layers: dict[str, StoredLayer] = {
            layer.tensor: layer for layer in layout.read_layers(config, self.checkpoint)
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers.values():
            self._check(layer)

    def _check(self, layer: StoredLayer) -> None:
        """CheckpointError unless the tensors of `layer` are there, as its layout has them; single numbers and
        vectors may have shapes of another program's."""
        refusal = self.layout.refusal(layer)
        if refusal is not None:
            raise CheckpointError(f"{self.folder}: {refusal}")
        for spec in self.layout.tensors(layer):
            entry = self.checkpoint.entries.get(spec.name)
            if entry is None:
                raise CheckpointError(f"{self.folder}: {spec.name} is missing. Download the checkpoint again.")
            shape, wanted = tuple(entry.shape), tuple(spec.shape)
            one = math.prod(shape) == math.prod(wanted) == 1
            fits = spec.any_size or one or wanted in (shape, (*shape, 1))
            if entry.dtype != spec.dtype or not fits:
                raise CheckpointError(
                    f"{self.folder}: {spec.name} is {entry.dtype} {list(entry.shape)}, but config.json says "
                    f"{spec.dtype} {list(spec.shape)}. Download both again."
                )
            self._shapes[spec.name] = shape if spec.any_size else wanted

    def _read(self, name: str) -> Tensor:
        """A tensor in the shape that the layout gives it."""
        found = self.checkpoint.read(name)
        return found.view(self._shapes.get(name, found.shape))

    def quantized(self, tensor: str) -> list[QTensor]:
        """The QTensors of an original tensor, one for each stacked matrix."""
        return self.layout.decode(self.layers[tensor], self._read)

    def packed(self, tensor: str) -> list[PackedMatrix]:
        """The QTensors of an original tensor, one for each stacked matrix, with their codes left packed."""
        return self.layout.decode_packed(self.layers[tensor], self._read)

    def static_inputs(self) -> dict[str, list[StaticInput]]:
        """The static input scales of every layer that has them, by original tensor, one for each stacked matrix."""
        return {name: self.inputs(name) for name, layer in self.layers.items() if layer.static_input is not None}

    def inputs(self, tensor: str) -> list[StaticInput]:
        """The static input scales of one layer; empty where it has none."""
        return self.layout.decode_inputs(self.layers[tensor], self._read)

    def columns(self) -> dict[str, list[Tensor]]:
        """Which columns every layer keeps that does so beside quantized inputs, one index for each stacked matrix."""
        kept = {
            name: layer
            for name, layer in self.layers.items()
            if layer.scheme.weight.columns is not None and layer.scheme.input is not None
        }
        return {name: self.layout.decode_columns(layer, self._read) for name, layer in kept.items()}

    def dense(self, tensor: str) -> Tensor:
        """An original tensor dequantized, in its original shape and dtype."""
        layer = self.layers[tensor]
        parts = [q.dequantize(layer.dtype) for q in self.quantized(tensor)]
        if layer.original:
            return parts[0].view(layer.original)
        parts = [part.T if layer.transposed else part for part in parts]
        return torch.stack(parts) if layer.experts > 1 else parts[0].contiguous()

    def cache(self, trust_remote_code: bool = False) -> CacheScheme | None:
        """How keys and values are kept, with the scales of each layer; None: as they are."""
        scheme = read_scheme(self.config)
        if scheme is None:
            return None
        config = load_config(resolve_model(self.folder), trust_remote_code, drop_quantization=True)
        skeleton = build_skeleton(config, trust_remote_code)
        return stored_cache(scheme, skeleton, read_anatomy(skeleton, self.originals()), self.checkpoint)

    def kept(self) -> list[str]:
        """Names of the tensors that were not quantized."""
        parts = {spec.name for layer in self.layers.values() for spec in self.layout.tensors(layer)}
        if read_scheme(self.config) is not None:
            parts |= {name for name in self.checkpoint.entries if name.rpartition(".")[2] in SUFFIXES}
        return [name for name in self.checkpoint.entries if name not in parts]

    def originals(self) -> dict[str, _Shape]:
        """Shapes and dtypes under the original names, as `read_anatomy` wants them."""
        found = {
            name: _Shape(self.checkpoint.entries[name].shape, self.checkpoint.entries[name].dtype)
            for name in self.kept()
        }
        for name, layer in self.layers.items():
            shape = layer.original or (layer.shape[::-1] if layer.transposed else layer.shape)
            found[name] = _Shape((layer.experts, *shape) if layer.experts > 1 else shape, layer.dtype)
        return {name: found[name] for name in natural_order(found)}


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
