"""Load what `quantize` wrote: a transformers model whose layers run packed codes, or one with dequantized weights and
activations quantized by simulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import CheckpointError, ModelError
from bitgrain.models.anatomy import Anatomy, read_anatomy
from bitgrain.models.materialize import Weightless, load_dense_into
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.observers import StaticInput, shared_input
from bitgrain.pipeline.equip import equip
from bitgrain.pipeline.execution import Execution, KernelChoice, choose_execution, choose_kernels, run_packed_
from bitgrain.pipeline.places import Place, find_places
from bitgrain.pipeline.stored import open_stored
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.recipes.scheme import NVFP4_INPUT_OUTER_SCALE, Scheme
from bitgrain.runtime.activations import InputQuantizer, Rounding, quantize_expert_inputs
from bitgrain.runtime.attention import AttentionScheme
from bitgrain.runtime.channel_order import attach_orders
from bitgrain.runtime.convolutions import quantize_layer_inputs
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.kv_cache import CacheScheme
from bitgrain.runtime.low_bit_linear import hold_low_bit_
from bitgrain.runtime.memory import no_holes
from bitgrain.runtime.online import attach_rotations


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rounding: Rounding = "vllm",
    kv_cache: str | CacheScheme | None = None,
    attention: str | AttentionScheme | None = None,
    low_bit: bool = False,
    execution: Execution | None = None,
    activations: Literal["int8"] | None = None,
) -> nn.Module:
    """A transformers model in eval mode that runs a checkpoint in any of the layouts that bitgrain reads.

    folder: a folder, a hub name, or a GGUF file.

    execution: "kernels" (the default): packed weights run through native kernels (`runtime.quant_linear`,
    `quant_embedding`, `quant_experts`), without gradients; "dequantize": dense weights, quantized activations
    simulated; "reference": the kernels' readable twins.
    activations: "int8" lets weight-only layers quantize their inputs to 8 bits for each token, which is faster and no
    longer what the checkpoint says.
    kv_cache: how keys and values of the past are kept (`runtime.kv_cache.SCHEMES`), in `generate` too. None: as the
    checkpoint says, if it was quantized with a KV cache; "none": as they are.
    low_bit: weights of linear layers stay packed in memory (`runtime.low_bit_linear`), and are dequantized for each
    product: what LoRA is trained on, in place of an execution. Stacks of experts, embeddings and tied heads are
    dequantized.
    attention: how Q, K, P and V are multiplied (`runtime.attention.SCHEMES`).
    rounding: whose arithmetic quantized activations follow, vLLM's kernels or transformers with compressed-tensors.
    dtype None: as in the checkpoint. A checkpoint that is not quantized loads as it is.
    Raises ModelError (no such model), CheckpointError (damaged or not ours), SchemeError (no such cache or attention,
    no kernel for some layers), KernelError (the native module is not here).
    """
    chosen = choose_execution(execution, low_bit)
    model = load_layers(folder, device, dtype, trust_remote_code, rounding, low_bit, chosen, activations)
    equip(model, folder, trust_remote_code, kv_cache, attention, chosen)
    return model


def load_layers(
    folder: str | Path,
    device: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rounding: Rounding = "vllm",
    low_bit: bool = False,
    execution: Execution = "kernels",
    activations: Literal["int8"] | None = None,
    config: PretrainedConfig | None = None,
) -> nn.Module:
    """What `load` returns before `equip`. config: in place of the folder's own, without its quantization."""
    source = resolve_model(folder, gguf=True)
    config = config or load_config(source, trust_remote_code, drop_quantization=True)
    skeleton = build_skeleton(config, trust_remote_code)
    where = resolve_device(device)
    stored = open_stored(source.path)
    originals = stored.originals()
    anatomy = read_anatomy(skeleton, originals)
    if not stored.layers:
        tensors = ((name, stored.read(name)) for name in originals if name not in anatomy.unexpected)
        return load_dense_into(skeleton, config, tensors, where, dtype)
    stray = [name for name in anatomy.unexpected if name in stored.layers]
    if stray:
        raise CheckpointError(f"{folder}: quantized layers that the model does not have: {', '.join(stray[:3])}")

    static, columns = stored.static_inputs(), stored.columns()
    schemes = {name: layer.scheme for name, layer in stored.layers.items()}
    shared = {name: layer.input_global_scale for name, layer in stored.layers.items()}
    quantizers = input_quantizers(anatomy, schemes, rounding, static=static, columns=columns, global_scales=shared)
    packed = _packed_layers(skeleton, anatomy, stored) if low_bit else {}
    places: list[Place] = []
    kernels: dict[str, KernelChoice] = {}
    if not low_bit and execution != "dequantize":
        places, reasons = find_places(skeleton, anatomy, stored.layers)
        kernels = choose_kernels(stored.layers, places, reasons, quantizers, where, execution, activations)

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name in originals:
            if name in packed or name in kernels:
                own = config.dtype if isinstance(config.dtype, torch.dtype) else stored.layers[name].dtype
                yield name, Weightless.of(originals[name].shape, dtype or own)  # replaced below
            elif name not in anatomy.unexpected:
                yield name, stored.dense(name)

    experts_run_one_by_one(config)
    model = load_dense_into(skeleton, config, dense(), "cpu" if packed or kernels else where, dtype)
    attach_rotations(model, stored.config.get("online_rotations", {}))
    with no_holes():
        for name, path in packed.items():  # one by one: unpacked codes take four bytes a weight and more
            hold_low_bit_(model, {path: stored.quantized(name)[0]}, {path: stored.layers[name].dtype})
        dtypes = {name: layer.dtype for name, layer in stored.layers.items()}
        sizes = {place: sum(stored.layers[name].elements for name in place.tensors) for place in places}
        for place in sorted(places, key=lambda place: -sizes[place]):  # what is read stands beside the rest
            run_packed_(model, place, kernels, stored.packed, dtypes)
            for path in {place.module, *place.paths}:
                quantizers.pop(place.target if place.kind == "experts" else f"{path}.weight", None)
    if kernels:
        model.requires_grad_(False)  # kernels compute no gradients
    model.to(where)
    attach_orders(model, _orders(stored, static))
    attach_quantizers(model, quantizers)
    return model


def _packed_layers(skeleton: nn.Module, anatomy: Anatomy, stored: StoredModel) -> dict[str, str]:
    """Original tensors that can stay packed -> their modules: each is the whole weight of one linear layer."""
    tied = {name for group in anatomy.tied for name in group}
    return {
        weight.tensor: weight.memory_module
        for weight in anatomy.weights
        if weight.tensor in stored.layers
        and weight.targets == (weight.memory,) == (f"{weight.memory_module}.weight",)
        and weight.experts == 1
        and weight.memory not in tied
        and type(skeleton.get_submodule(weight.memory_module)) in (nn.Linear, Conv1D)
    }


def _orders(stored: StoredModel, static: Mapping[str, Sequence[StaticInput]]) -> dict[str, Tensor]:
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
    spec: QuantSpec,
    rounding: Rounding = "vllm",
    static: Sequence[StaticInput] = (),
    columns: Tensor | None = None,
    global_scales: Sequence[float | None] = (),
) -> InputQuantizer:
    """The simulation of an input spec; nested scales get the constant that is written to the file.

    global_scales: what a file has in place of that constant's inverse; of several, the largest counts, as in vLLM.
    static: the scales of a static spec. Several, of layers or experts that engines run as one, become one as there:
    vLLM runs all experts with the largest. columns: channels that the weight keeps, which are not rounded. Raises
    SchemeError for a static spec without any.
    """
    outer, usual = None, 1 / NVFP4_INPUT_OUTER_SCALE
    if isinstance(spec.scale, QuantSpec):
        outer = 1 / max((usual if one is None else one for one in global_scales), default=usual)
    return InputQuantizer(spec, outer, rounding, shared_input(static, spec) if static else None, columns)


def shared_columns(columns: Sequence[Tensor | None], name: str) -> Tensor | None:
    """The channels that matrices with one input quantizer all keep. Raises ModelError if they differ."""
    first = columns[0] if columns else None
    for other in columns:
        if (other is None) != (first is None) or (other is not None and first is not None and not other.equal(first)):
            raise ModelError(
                f"{name}: its matrices share their quantized inputs and keep different columns; choose columns by "
                "activation or random"
            )
    return first


def attach_input_quantizers(
    model: nn.Module,
    anatomy: Anatomy,
    schemes: Mapping[str, Scheme],
    rounding: Rounding = "vllm",
    prefix: str = "",
    static: Mapping[str, Sequence[StaticInput]] | None = None,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Give every layer whose scheme quantizes activations its InputQuantizer, see `input_quantizers`.

    `model` may be a part of the whole: the module whose path, with a dot, is `prefix`.
    """
    found = input_quantizers(anatomy, schemes, rounding, prefix, static, columns)
    attach_quantizers(model, {target.removeprefix(prefix): quantizer for target, quantizer in found.items()})


def attach_quantizers(model: nn.Module, quantizers: Mapping[str, InputQuantizer]) -> None:
    """Give each to the module that owns its parameter; by the parameter's path."""
    experts: dict[str, dict[str, InputQuantizer]] = defaultdict(dict)
    for target, quantizer in quantizers.items():
        path, _, leaf = target.rpartition(".")
        if leaf == "weight":
            quantize_layer_inputs(model.get_submodule(path), quantizer)
        else:
            experts[path][leaf] = quantizer
    for path, of_path in experts.items():
        quantize_expert_inputs(model.get_submodule(path), of_path)


def input_quantizers(
    anatomy: Anatomy,
    schemes: Mapping[str, Scheme],
    rounding: Rounding = "vllm",
    prefix: str = "",
    static: Mapping[str, Sequence[StaticInput]] | None = None,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
    global_scales: Mapping[str, float | None] | None = None,
) -> dict[str, InputQuantizer]:
    """The quantizers of inputs by the path of the parameter in memory; `schemes` by original tensor name.

    prefix: only paths that begin so. static: the scales of static specs, by original tensor name; columns: which ones
    weights keep, global_scales: `StoredLayer.input_global_scale`, likewise. Raises ModelError where tensors that share
    one parameter in memory have different input specs or columns, SchemeError for a static spec without its scale.
    """
    specs: dict[str, QuantSpec] = {}
    scales: dict[str, list[StaticInput]] = defaultdict(list)
    kept: dict[str, list[Tensor | None]] = defaultdict(list)
    shared: dict[str, list[float | None]] = defaultdict(list)
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
                kept[target] += (columns or {}).get(weight.tensor, (None,))
                shared[target].append((global_scales or {}).get(weight.tensor))
    return {
        target: input_quantizer_for(
            spec, rounding, scales[target], shared_columns(kept[target], target), shared[target]
        )
        for target, spec in specs.items()
    }
