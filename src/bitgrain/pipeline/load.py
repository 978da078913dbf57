"""Load what `quantize` wrote: a transformers model with dequantized weights, activations quantized by simulation."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.checkpoints import bitgrain_layout, compressed_tensors_reader
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.errors import CheckpointError, ModelError
from bitgrain.models.anatomy import Anatomy, read_anatomy
from bitgrain.models.materialize import load_dense_into
from bitgrain.models.naming import natural_order
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.observers import StaticInput, shared_input
from bitgrain.recipes.scheme import NVFP4_INPUT_OUTER_SCALE, Scheme
from bitgrain.runtime.activations import InputQuantizer, Rounding, quantize_expert_inputs, quantize_inputs
from bitgrain.runtime.attention import AttentionScheme, set_attention
from bitgrain.runtime.channel_order import attach_orders
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.kv_cache import CacheScheme, KVCache, get_cache_scheme, use_cache
from bitgrain.runtime.online import attach_rotations


class QuantizedCheckpoint:
    """A quantized checkpoint as its original names: which layers are quantized, and every tensor dequantized.

    Raises CheckpointError for a folder that holds no quantized checkpoint that bitgrain can read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.config: dict[str, Any] = config.get("quantization_config") or {}
        method = self.config.get("quant_method")
        self.layout: Layout
        if method == "bitgrain":
            self.layout, layers = bitgrain_layout.BitgrainLayout(), bitgrain_layout.read_layers(self.config)
        elif method == "compressed-tensors":
            self.layout = compressed_tensors_reader.CompressedTensors()
            layers = compressed_tensors_reader.read_layers(self.config, self.checkpoint)
        else:
            what = f"is quantized with {method}" if method else "is not quantized"
            raise CheckpointError(f"{folder} {what}; bitgrain.load reads what bitgrain quantize wrote")
        self.layers: dict[str, StoredLayer] = {layer.tensor: layer for layer in layers}

    def quantized(self, tensor: str) -> list[QTensor]:
        """The QTensors of an original tensor, one for each stacked matrix."""
        return self.layout.decode(self.layers[tensor], self.checkpoint.read)

    def static_inputs(self) -> dict[str, list[StaticInput]]:
        """The static input scales of every layer that has them, by original tensor, one for each stacked matrix."""
        static = {name: layer for name, layer in self.layers.items() if layer.static_input is not None}
        return {name: self.layout.decode_inputs(layer, self.checkpoint.read) for name, layer in static.items()}

    def dense(self, tensor: str) -> Tensor:
        """An original tensor dequantized, in its original shape and dtype."""
        layer = self.layers[tensor]
        parts = [q.dequantize(layer.dtype) for q in self.quantized(tensor)]
        parts = [part.T if layer.transposed else part for part in parts]
        return torch.stack(parts) if layer.experts > 1 else parts[0].contiguous()

    def kept(self) -> list[str]:
        """Names of the tensors that were not quantized."""
        parts = {spec.name for layer in self.layers.values() for spec in self.layout.tensors(layer)}
        return [name for name in self.checkpoint.entries if name not in parts]

    def originals(self) -> dict[str, _Shape]:
        """Shapes and dtypes under the original names, as `read_anatomy` wants them."""
        found = {
            name: _Shape(self.checkpoint.entries[name].shape, self.checkpoint.entries[name].dtype)
            for name in self.kept()
        }
        for name, layer in self.layers.items():
            shape = layer.shape[::-1] if layer.transposed else layer.shape
            found[name] = _Shape((layer.experts, *shape) if layer.experts > 1 else shape, layer.dtype)
        return {name: found[name] for name in natural_order(found)}


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rounding: Rounding = "vllm",
    kv_cache: str | CacheScheme | None = None,
    attention: str | AttentionScheme | None = None,
) -> nn.Module:
    """A transformers model in eval mode with the weights of a checkpoint that bitgrain wrote, dequantized.

    kv_cache: how keys and values of the past are kept (`runtime.kv_cache.SCHEMES`), in `generate` too.
    attention: how Q, K, P and V are multiplied (`runtime.attention.SCHEMES`).
    rounding: whose arithmetic quantized activations follow, vLLM's kernels or transformers with compressed-tensors.
    dtype None: as in the checkpoint. A checkpoint that is not quantized loads as it is.
    Raises ModelError (no such model), CheckpointError (damaged or not ours), SchemeError (no such cache or
    attention).
    """
    model = _load(folder, device, dtype, trust_remote_code, rounding)
    if kv_cache is not None:
        scheme = get_cache_scheme(kv_cache)
        config = model.config
        KVCache(scheme, config)  # what cannot be is said now
        use_cache(model, lambda: KVCache(scheme, config))
    if attention is not None:
        set_attention(model, attention)
    return model


def _load(
    folder: str | Path, device: str, dtype: torch.dtype | None, trust_remote_code: bool, rounding: Rounding
) -> nn.Module:
    source = resolve_model(folder)
    config = load_config(source, trust_remote_code, drop_quantization=True)
    skeleton = build_skeleton(config, trust_remote_code)
    where = resolve_device(device)
    raw = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if not raw.get("quantization_config"):
        plain = open_checkpoint(source.path)
        known = read_anatomy(skeleton, plain.entries)
        tensors = ((name, plain.read(name)) for name in natural_order(plain.entries) if name not in known.unexpected)
        return load_dense_into(skeleton, config, tensors, where, dtype)
    stored = QuantizedCheckpoint(source.path)
    originals = stored.originals()
    anatomy = read_anatomy(skeleton, originals)
    stray = [name for name in anatomy.unexpected if name in stored.layers]
    if stray:
        raise CheckpointError(f"{folder}: quantized layers that the model does not have: {', '.join(stray[:3])}")

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name in originals:
            if name not in anatomy.unexpected:
                yield name, stored.dense(name) if name in stored.layers else stored.checkpoint.read(name)

    experts_run_one_by_one(config)
    model = load_dense_into(skeleton, config, dense(), where, dtype)
    attach_rotations(model, stored.config.get("online_rotations", {}))
    static = stored.static_inputs()
    attach_orders(model, _orders(stored, static))
    schemes = {name: layer.scheme for name, layer in stored.layers.items()}
    attach_input_quantizers(model, anatomy, schemes, rounding, static=static)
    return model


def _orders(stored: QuantizedCheckpoint, static: Mapping[str, Sequence[StaticInput]]) -> dict[str, Tensor]:
    """The orders in which norms write their channels, by the norm's path."""
    found: dict[str, Tensor] = {}
    for path, tensor in stored.config.get("reordered_norms", {}).items():
        order = next((one.order for one in static.get(tensor, ())), None)
        if order is None:
            raise CheckpointError(f"the checkpoint reorders the output of {path}, but {tensor} has no order for it")
        found[path] = order
    return found


def experts_run_one_by_one(config: Any) -> None:
    """Ask transformers for its plain loop over experts, which `quantize_expert_inputs` can watch."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if part is not None:
            part._experts_implementation = "eager"


def input_quantizer_for(
    spec: QuantSpec, rounding: Rounding = "vllm", static: Sequence[StaticInput] = ()
) -> InputQuantizer:
    """The simulation of an input spec; nested scales get the constant that is written to the file.

    static: the scales of a static spec. Several, of layers or experts that engines run as one, become one as there:
    vLLM runs all experts with the largest. Raises SchemeError for a static spec without any.
    """
    outer = NVFP4_INPUT_OUTER_SCALE if isinstance(spec.scale, QuantSpec) else None
    return InputQuantizer(spec, outer, rounding, shared_input(static, spec) if static else None)


def attach_input_quantizers(
    model: nn.Module,
    anatomy: Anatomy,
    schemes: Mapping[str, Scheme],
    rounding: Rounding = "vllm",
    prefix: str = "",
    static: Mapping[str, Sequence[StaticInput]] | None = None,
) -> None:
    """Give every layer whose scheme quantizes activations its InputQuantizer; `schemes` by original tensor name.

    `model` may be a part of the whole: the module whose path, with a dot, is `prefix`. static: the scales of static
    specs, by original tensor name. Raises ModelError where tensors that share one parameter in memory have different
    input specs, SchemeError for a static spec without its scale.
    """
    specs: dict[str, QuantSpec] = {}
    scales: dict[str, list[StaticInput]] = defaultdict(list)
    for weight in anatomy.weights:
        scheme = schemes.get(weight.tensor)
        if scheme is None or scheme.input is None:
            continue
        for target in weight.targets or (weight.memory,):
            if target.startswith(prefix):
                if specs.setdefault(target, scheme.input) != scheme.input:
                    parts = "its parts" if target.endswith(".weight") else "experts"
                    raise ModelError(f"{target}: {parts} have different activation schemes; give them one scheme")
                scales[target] += (static or {}).get(weight.tensor, ())
    experts: dict[str, dict[str, InputQuantizer]] = defaultdict(dict)
    for target, spec in specs.items():
        quantizer = input_quantizer_for(spec, rounding, scales[target])
        path, _, leaf = target.removeprefix(prefix).rpartition(".")
        if leaf == "weight":
            quantize_inputs(model.get_submodule(path), quantizer)
        else:
            experts[path][leaf] = quantizer
    for path, quantizers in experts.items():
        quantize_expert_inputs(model.get_submodule(path), quantizers)
