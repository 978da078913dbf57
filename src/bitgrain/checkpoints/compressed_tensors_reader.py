"""Which layers of a compressed-tensors checkpoint are quantized, and how: from its config and headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.linear_layers import kept_dtype
from bitgrain.checkpoints.patterns import name_matches
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import Lenient, parse
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, mxfp4, nvfp4, per_block, per_channel, per_group, per_tensor
from bitgrain.numerics.formats import BF16, FP8_E4M3, FP16, FP32, FloatFormat, Format
from bitgrain.recipes import Scheme
from bitgrain.recipes.scheme import NVFP4_INPUT_OUTER_SCALE


class _Arguments(Lenient):
    """QuantizationArgs of compressed-tensors, what of it is read."""

    num_bits: int
    type: Literal["int", "float"]
    strategy: str
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False
    group_size: int | None = None
    block_structure: Annotated[list[int], Len(2, 2)] | None = None


class _Group(Lenient):
    """QuantizationScheme of compressed-tensors."""

    targets: list[str]
    weights: _Arguments
    input_activations: _Arguments | None = None


class _Settings(Lenient):
    """QuantizationConfig of compressed-tensors."""

    config_groups: dict[str, _Group]


_STORAGE = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


def read_layers(config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
    """Every module with a `weight_scale` on disk, with the scheme of the config group that targets it.

    Raises CheckpointError for a module that no group targets, or a group that bitgrain cannot express.
    """
    entries = checkpoint.entries
    settings = parse(_Settings, config, "quantization_config")
    layers: list[StoredLayer] = []
    schemes: dict[tuple[str, FloatFormat, FloatFormat], Scheme] = {}
    for name, entry in entries.items():
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        key = _group_of(module, settings)
        storage = _STORAGE.get(entry.dtype, BF16)
        static = entries.get(f"{module}.input_scale")
        kind = (key, storage, FP32 if static is None else _STORAGE.get(static.dtype, FP32))
        if kind not in schemes:
            schemes[kind] = _scheme(key, settings.config_groups[key], *kind[1:])
        inputs = schemes[kind].input
        if inputs is not None and not inputs.dynamic and static is None:
            raise CheckpointError(f"{module}.input_scale is missing: its inputs have a static scale")
        rows, cols = _shape(module, checkpoint)
        scheme = schemes[kind]
        if (order := entries.get(f"{module}.weight_g_idx")) is not None:
            if tuple(order.shape) != (cols,) or order.dtype != torch.int32 or scheme.weight.granularity.cols is None:
                raise CheckpointError(f"{module}.weight_g_idx is {order.dtype} {list(order.shape)}, for {cols} inputs")
            scheme = replace(scheme, weight=replace(scheme.weight, ordered=True))
        layers.append(
            StoredLayer(
                tensor=f"{module}.weight",
                module=module,
                memory_module=module,
                class_name="Linear",
                role="linear",
                out_features=rows,
                in_features=cols,
                experts=1,
                transposed=False,
                dtype=entry.dtype if entry.dtype in _STORAGE else kept_dtype(entries) or torch.bfloat16,
                scheme=scheme,
                input_global_scale=_input_global_scale(module, scheme, checkpoint),
            )
        )
    return layers


def _input_global_scale(module: str, scheme: Scheme, checkpoint: Checkpoint) -> float | None:
    """Of NVFP4 inputs, where it is not the constant that we write: llm-compressor calibrates it."""
    if scheme.input is None or not isinstance(scheme.input.scale, QuantSpec):
        return None
    name = f"{module}.input_global_scale"
    entry = checkpoint.entries.get(name)
    if entry is None or entry.dtype != torch.float32 or math.prod(entry.shape) != 1:
        raise CheckpointError(f"{name}: one float32 is needed, for NVFP4 inputs")
    found = float(checkpoint.read(name))
    if not 0 < found < math.inf:
        raise CheckpointError(f"{name} is {found}, which is no scale")
    return None if found == 1 / NVFP4_INPUT_OUTER_SCALE else found


def _shape(module: str, checkpoint: Checkpoint) -> tuple[int, int]:
    entries = checkpoint.entries
    plain = entries.get(f"{module}.weight")
    if plain is not None and len(plain.shape) == 2:
        return plain.shape[0], plain.shape[1]
    packed = entries.get(f"{module}.weight_packed")
    if packed is None or len(packed.shape) != 2:
        raise CheckpointError(
            f"{module} has a scale but neither weight nor weight_packed as a matrix: the checkpoint is incomplete"
        )
    if packed.dtype == torch.uint8:
        return packed.shape[0], packed.shape[1] * 2
    shape = checkpoint.read(f"{module}.weight_shape")
    if shape.is_floating_point() or shape.numel() != 2 or int(shape[0]) != packed.shape[0] or int(shape[1]) < 1:
        raise CheckpointError(
            f"{module}.weight_shape is {shape.tolist()}, but weight_packed has {packed.shape[0]} rows"
        )
    return int(shape[0]), int(shape[1])


def _group_of(module: str, settings: _Settings) -> str:
    by_class: str | None = None
    for key, group in settings.config_groups.items():
        for target in group.targets:
            if target == module or (target.startswith("re:") and name_matches(target[3:], module)):
                return key
            if target == "Linear":
                by_class = key
    if by_class is None:
        raise CheckpointError(f"{module} is quantized, but no group of quantization_config targets it")
    return by_class


def _scheme(name: str, group: _Group, storage: FloatFormat, input_storage: FloatFormat) -> Scheme:
    inputs = group.input_activations
    try:
        return Scheme(
            name, _spec(group.weights, storage), _spec(inputs, input_storage, activation=True) if inputs else None
        )
    except SchemeError as error:
        raise CheckpointError(f"quantization_config, {name}: {error}") from error


def _spec(arguments: _Arguments, storage: FloatFormat, activation: bool = False) -> QuantSpec:
    strategy, bits = arguments.strategy, arguments.num_bits
    dynamic = arguments.dynamic in (True, "local")
    if arguments.type == "float" and bits == 4:
        return nvfp4(dynamic) if strategy == "tensor_group" else mxfp4(dynamic)
    format: Format
    if arguments.type == "float":
        if bits != 8:
            raise SchemeError(f"floats of {bits} bits")
        format = FP8_E4M3
    else:
        format = IntFormat(bits)
    block = arguments.block_structure or [0, 0]
    granularity = {
        "tensor": per_tensor,
        "channel": per_channel,
        "token": per_channel,
        "group": lambda: per_group(arguments.group_size or 0),
        "block": lambda: per_block(block[0], block[1]),
    }.get(strategy)
    if granularity is None:
        raise SchemeError(f"strategy {strategy!r}")
    return QuantSpec(
        format,
        granularity(),
        zero_point="none" if arguments.symmetric else "integer",
        restricted=activation and arguments.symmetric and isinstance(format, IntFormat),
        scale=storage,
        dynamic=dynamic,
    )
