"""Quantized inputs as plain ONNX nodes, rounded as `runtime.activations` rounds them (vLLM's arithmetic).

ONNX's DynamicQuantizeLinear has one scale and zero point for the whole tensor; scales per token and per group are
therefore said in full: ReduceMax, Div, Round, Clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.form import (
    FLOAT,
    FLOAT8E4M3FN,
    FLOAT8E5M2,
    INT8,
    INT64,
    UINT8,
    Constant,
    Initializer,
    as_bytes,
)
from bitgrain.numerics import IntFormat, QuantSpec, per_tensor
from bitgrain.numerics.formats import FP8_E4M3, FP8_E5M2, Format
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.qtensor import scale_values

if TYPE_CHECKING:
    from onnx import NodeProto

_FLOATS: dict[Format, int] = {FP8_E4M3: FLOAT8E4M3FN, FP8_E5M2: FLOAT8E5M2}
_STATIC: dict[Format, int] = {**_FLOATS, IntFormat(8): INT8, IntFormat(8, False): UINT8}


def input_refusal(layer: StoredLayer) -> str | None:
    """Why the inputs of `layer` cannot be said."""
    spec = layer.scheme.input
    if spec is None:
        return None
    what = f"{layer.module}: inputs {spec.describe()}"
    if spec.threshold or spec.clusters:
        return f"{what} have no ONNX form"
    if not spec.dynamic:
        if spec.format not in _STATIC or spec.granularity != per_tensor() or isinstance(spec.scale, QuantSpec):
            return f"{what}: QuantizeLinear takes static int8, uint8 or fp8 with one scale"
        return None
    if not isinstance(spec.format, IntFormat) and spec.format not in _FLOATS:
        return f"{what}: only integers and fp8 can be rounded by ONNX nodes"
    if not spec.symmetric or isinstance(spec.scale, QuantSpec) or spec.granularity.rows != 1:
        return f"{what}: only symmetric scales per token or per group of channels, not nested, have an ONNX form"
    if spec.granularity.cols is not None and layer.in_features % spec.granularity.cols:
        return f"{what}: groups do not divide {layer.in_features}"
    return None


def input_initializers(layer: StoredLayer) -> list[Initializer]:
    """The constants of the inputs' arithmetic."""
    spec, name = layer.scheme.input, layer.tensor
    if spec is None:
        return []
    if not spec.dynamic:
        return [
            Initializer(f"{name}.input_scale", FLOAT, (), 4),
            Initializer(f"{name}.input_zero", _STATIC[spec.format], (), 1),
        ]
    return []


def inline_constants(layer: StoredLayer) -> dict[str, Constant]:
    """The numbers that inputs with dynamic scales are computed with."""
    spec = layer.scheme.input
    if spec is None or not spec.dynamic:
        return {}
    numbers = {0.0, 1.0, *_numbers(spec)}
    found: dict[str, Constant] = {_named(number): (FLOAT, (), [number]) for number in numbers}
    found["bitgrain.last_axis"] = (INT64, (1,), [-1])
    if (cols := spec.granularity.cols) is not None:
        found[_groups(layer, cols)] = (INT64, (3,), [-1, layer.in_features // cols, cols])
    return found


def _numbers(spec: QuantSpec) -> tuple[float, float, float]:
    """What a tile's largest number becomes, and the ends: a clipped input reaches the most negative code everywhere."""
    return spec.high, spec.format.minimum, spec.format.maximum


def _named(number: float) -> str:
    return f"bitgrain.{number:g}"


def _groups(layer: StoredLayer, cols: int) -> str:
    return f"bitgrain.groups.{layer.in_features // cols}.{cols}"


def encode_inputs(layer: StoredLayer, inputs: Sequence[StaticInput]) -> dict[str, Tensor]:
    """Their bytes."""
    spec, name = layer.scheme.input, layer.tensor
    if spec is None:
        return {}
    if not spec.dynamic:
        zero = inputs[0].zero
        code = torch.zeros(1, dtype=torch.uint8) if zero is None else zero.reshape(1).view(torch.uint8)
        return {
            f"{name}.input_scale": as_bytes(scale_values(inputs[0].scale).reshape(1)),
            f"{name}.input_zero": code,
        }
    return {}


def rounded_inputs(layer: StoredLayer, x: str, prefix: str) -> tuple[list[NodeProto], str]:
    """Nodes that give what the layer sees of `x`, in float32, and the name of that value."""
    spec, name = layer.scheme.input, layer.tensor
    if spec is None:
        return [], x
    if not spec.dynamic:
        scale, zero = f"{name}.input_scale", f"{name}.input_zero"
        return [
            node("QuantizeLinear", [x, scale, zero], f"{prefix}/x_codes"),
            node("DequantizeLinear", [f"{prefix}/x_codes", scale, zero], f"{prefix}/x"),
        ], f"{prefix}/x"
    nodes: list[NodeProto] = []
    seen = x
    if spec.granularity.cols is not None:
        nodes += [
            node("Shape", [x], f"{prefix}/x_shape"),
            node("Reshape", [x, _groups(layer, spec.granularity.cols)], f"{prefix}/x_groups"),
        ]
        seen = f"{prefix}/x_groups"
    steps, codes, scale = dynamic_codes(layer, seen, prefix)
    last = f"{prefix}/x" if seen == x else f"{prefix}/x_rounded"
    nodes += [*steps, node("Mul", [codes, scale], last)]
    if seen != x:
        nodes.append(node("Reshape", [last, f"{prefix}/x_shape"], f"{prefix}/x"))
    return nodes, f"{prefix}/x"


def dynamic_codes(layer: StoredLayer, x: str, prefix: str) -> tuple[list[NodeProto], str, str]:
    """Nodes that round `x` along its last axis; the names of the codes, as float32 numbers, and of their scales."""
    spec = layer.scheme.input
    assert spec is not None
    nodes = [
        node("Abs", [x], f"{prefix}/x_abs"),
        node("ReduceMax", [f"{prefix}/x_abs", "bitgrain.last_axis"], f"{prefix}/x_max", keepdims=1),
        node("Div", [f"{prefix}/x_max", _named(spec.high)], f"{prefix}/x_scale"),
        # a token of zeros has the scale 0: divided by 1, it stays zero
        node("Equal", [f"{prefix}/x_scale", _named(0.0)], f"{prefix}/x_empty"),
        node("Where", [f"{prefix}/x_empty", _named(1.0), f"{prefix}/x_scale"], f"{prefix}/x_step"),
        node("Div", [x, f"{prefix}/x_step"], f"{prefix}/x_scaled"),
    ]
    if spec.format in _FLOATS:
        nodes += [
            node("Cast", [f"{prefix}/x_scaled"], f"{prefix}/x_fp8", to=_FLOATS[spec.format], saturate=1),
            node("Cast", [f"{prefix}/x_fp8"], f"{prefix}/x_codes", to=FLOAT),
        ]
    else:
        nodes += [
            node("Round", [f"{prefix}/x_scaled"], f"{prefix}/x_round"),
            node("Clip", [f"{prefix}/x_round", *map(_named, _numbers(spec)[1:])], f"{prefix}/x_codes"),
        ]
    return nodes, f"{prefix}/x_codes", f"{prefix}/x_step"


def node(kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> NodeProto:
    """A node with one output, named after it."""
    from onnx import helper

    return helper.make_node(kind, list(inputs), [output], name=output, domain=domain or None, **attributes)
