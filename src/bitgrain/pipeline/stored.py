"""A checkpoint under its original names, whatever its layout: a quantized one, a plain one, or a GGUF file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.model import SUFFIX
from bitgrain.checkpoints.kv_scales import SUFFIXES, read_scheme
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS, layout_of
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.checkpoints.settings import read_settings, section
from bitgrain.errors import CheckpointError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.naming import StoredTensor, natural_order
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QTensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.pipeline.cache_plan import stored_cache
from bitgrain.pipeline.output_files import side_files
from bitgrain.pipeline.stored_gguf import GgufCheckpoint
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.runtime.kv_cache import CacheScheme


def open_stored(path: Path) -> StoredModel:
    """The checkpoint in a folder, quantized or not, or in a GGUF file. Raises CheckpointError for layouts not known."""
    if path.suffix == SUFFIX:
        return GgufCheckpoint(path)
    plain = layout_of(config := read_settings(path)) is None and not config.get("quantization_config")
    return PlainCheckpoint(path) if plain else QuantizedCheckpoint(path)


class QuantizedCheckpoint(StoredModel):
    """A quantized checkpoint in a folder.

    Raises CheckpointError for a folder that holds no quantized checkpoint that bitgrain can read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        config = read_settings(folder)
        layout = layout_of(config)
        if layout is None:
            method, packing = (section(config).get(key) for key in ("quant_method", "packing_format"))
            what = f"is quantized with {method}" if method else "is not quantized"
            what += f" (packed as {packing!r})" if packing else ""
            raise CheckpointError(f"{folder} {what}; bitgrain reads the layouts {', '.join(LAYOUTS)}")
        self.layout: Layout = layout
        self.kind = layout.name
        self.model_config = {key: value for key, value in config.items() if key not in layout.keys}
        self.config: Mapping[str, Any] = dict(section(config, layout.keys[0]))
        self.layers: Mapping[str, StoredLayer] = {
            layer.tensor: layer for layer in layout.read_layers(config, self.checkpoint)
        }
        if not self.layers:
            raise CheckpointError(f"{folder}: config.json says {layout.name}, but nothing is stored so; download it")
        self._shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers.values():
            self._check(layer)

    def _check(self, layer: StoredLayer) -> None:
        """CheckpointError unless the tensors of `layer` are there, as its layout has them; single numbers and
        vectors may have shapes of another program's."""
        refusal = self.layout.refusal(layer)
        if refusal is not None:
            raise CheckpointError(f"{self.path}: {refusal}")
        for spec in self.layout.tensors(layer):
            entry = self.checkpoint.entries.get(spec.name)
            if entry is None and spec.optional:
                continue
            if entry is None:
                raise CheckpointError(f"{self.path}: {spec.name} is missing. Download the checkpoint again.")
            shape, wanted = tuple(entry.shape), tuple(spec.shape)
            one = math.prod(shape) == math.prod(wanted) == 1
            fits = spec.any_size or one or wanted in (shape, (*shape, 1))
            if entry.dtype != spec.dtype or not fits:
                raise CheckpointError(
                    f"{self.path}: {spec.name} is {entry.dtype} {list(entry.shape)}, but config.json says "
                    f"{spec.dtype} {list(spec.shape)}. Download both again."
                )
            self._shapes[spec.name] = shape if spec.any_size else wanted

    def _read(self, name: str) -> Tensor:
        """A tensor in the shape that the layout gives it."""
        found = self.checkpoint.read(name)
        return found.view(self._shapes.get(name, found.shape))

    def quantized(self, tensor: str) -> list[QTensor]:
        return self.layout.decode(self.layers[tensor], self._read)

    def packed(self, tensor: str) -> list[PackedMatrix]:
        return self.layout.decode_packed(self.layers[tensor], self._read)

    def inputs(self, tensor: str) -> list[StaticInput]:
        return self.layout.decode_inputs(self.layers[tensor], self._read)

    def columns(self) -> dict[str, list[Tensor]]:
        kept = {
            name: layer
            for name, layer in self.layers.items()
            if layer.scheme.weight.columns is not None and layer.scheme.input is not None
        }
        return {name: self.layout.decode_columns(layer, self._read) for name, layer in kept.items()}

    def read(self, tensor: str) -> Tensor:
        return self.checkpoint.read(tensor)

    def cache(self, trust_remote_code: bool = False) -> CacheScheme | None:
        scheme = read_scheme(self.config)
        if scheme is None:
            return None
        config = load_config(resolve_model(self.path), trust_remote_code, drop_quantization=True)
        skeleton = build_skeleton(config, trust_remote_code)
        return stored_cache(scheme, skeleton, read_anatomy(skeleton, self.originals()), self.checkpoint)

    def kept(self) -> list[str]:
        parts = {spec.name for layer in self.layers.values() for spec in self.layout.tensors(layer)}
        if read_scheme(self.config) is not None:
            parts |= {name for name in self.checkpoint.entries if name.rpartition(".")[2] in SUFFIXES}
        return [name for name in self.checkpoint.entries if name not in parts]

    def originals(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {
            name: _Shape(self.checkpoint.entries[name].shape, self.checkpoint.entries[name].dtype)
            for name in self.kept()
        }
        for name, layer in self.layers.items():
            shape = layer.original or (layer.shape[::-1] if layer.transposed else layer.shape)
            found[name] = _Shape((layer.experts, *shape) if layer.experts > 1 else shape, layer.dtype)
        return {name: found[name] for name in natural_order(found)}

    def nbytes(self, tensor: str) -> int:
        layer, entries = self.layers.get(tensor), self.checkpoint.entries
        parts = [tensor] if layer is None else [part.name for part in self.layout.tensors(layer)]
        return sum(entries[part].nbytes for part in parts if part in entries)

    def side_files(self, with_code: bool) -> dict[str, bytes]:
        return _side_files(self.path, with_code)

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.path, self.checkpoint)


class PlainCheckpoint(StoredModel):
    """A checkpoint in a folder that is not quantized."""

    def __init__(self, folder: Path) -> None:
        self.path, self.kind = folder, "safetensors"
        self.checkpoint = open_checkpoint(folder)
        self.model_config = read_settings(folder)
        self.config: Mapping[str, Any] = {}
        self.layers: Mapping[str, StoredLayer] = {}

    def quantized(self, tensor: str) -> list[QTensor]:
        raise KeyError(tensor)

    def packed(self, tensor: str) -> list[PackedMatrix]:
        raise KeyError(tensor)

    def inputs(self, tensor: str) -> list[StaticInput]:
        return []

    def columns(self) -> dict[str, list[Tensor]]:
        return {}

    def read(self, tensor: str) -> Tensor:
        return self.checkpoint.read(tensor)

    def cache(self, trust_remote_code: bool = False) -> CacheScheme | None:
        return None

    def kept(self) -> list[str]:
        return list(self.checkpoint.entries)

    def originals(self) -> dict[str, StoredTensor]:
        return {name: self.checkpoint.entries[name] for name in natural_order(self.checkpoint.entries)}

    def nbytes(self, tensor: str) -> int:
        return self.checkpoint.entries[tensor].nbytes

    def side_files(self, with_code: bool) -> dict[str, bytes]:
        return _side_files(self.path, with_code)

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.path, self.checkpoint)


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def _side_files(folder: Path, with_code: bool) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*side_files(folder, with_code), *folder.glob("recipe.yaml")]}


def _fingerprint(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {"source": checkpoint.fingerprint(), "config": config}
