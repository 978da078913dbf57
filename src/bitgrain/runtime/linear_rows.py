"""The rows of the operator table for linear layers: x W^T + b with a packed W.

Which kernel serves a layer is decided by properties of its specs, not by names of schemes. A GPU's kernels will be rows
with their device.
"""

from __future__ import annotations

from collections.abc import Callable

from bitgrain.numerics import IntFormat, QuantSpec, per_token
from bitgrain.numerics.formats import FloatFormat
from bitgrain.runtime.kernel_arguments import (
    refuse_codes,
    refuse_float_inputs,
    refuse_inputs,
    refuse_integers,
    refuse_ordered,
)
from bitgrain.runtime.operators import ANY, NOT_MINE, Operator, find_serving, register_operator
from bitgrain.runtime.packed_kernels import CodeKernel, CodeTwin, IntKernel, IntTwin, PackedKernel

INT8_INPUTS = QuantSpec(IntFormat(8), per_token(), restricted=True, dynamic=True)
"""What weight-only layers may be given: 8 bits for each token."""

Refusal = Callable[[QuantSpec, QuantSpec | None], str | None]

_CODES = "int1-8, uint1-8, ternary, binary, fp8, nf4, fp4 (MXFP4, NVFP4), any table of up to 16"
_EXACT = "products of the rounded numbers as above (exact but for tables), float32 sums, then the inputs' scale"
_INTEGERS = "int1-8, uint1-8, ternary, binary"


def _codes(weight: QuantSpec, inputs: QuantSpec | None) -> str | None:
    return refuse_codes(weight) if inputs is None else NOT_MINE


def _floats(mine: Callable[[QuantSpec], bool]) -> Refusal:
    def refuse(weight: QuantSpec, inputs: QuantSpec | None) -> str | None:
        if inputs is None or not isinstance(inputs.format, FloatFormat):
            return NOT_MINE
        reason = refuse_float_inputs(inputs, weight) or refuse_codes(weight) or refuse_ordered(weight, inputs)
        return reason or (None if mine(inputs) else NOT_MINE)

    return refuse


def _integers(mine: Callable[[QuantSpec], bool]) -> Refusal:
    def refuse(weight: QuantSpec, inputs: QuantSpec | None) -> str | None:
        if inputs is None:
            return refuse_codes(weight) or "inputs in 16 bits"
        if isinstance(inputs.format, FloatFormat):
            return NOT_MINE
        reason = refuse_inputs(inputs) or refuse_integers(weight) or refuse_ordered(weight, inputs)
        return reason or (None if mine(inputs) else NOT_MINE)

    return refuse


_ROWS: tuple[tuple[str, str, Refusal, type[PackedKernel], type[PackedKernel], str], ...] = (
    (
        _CODES,
        "16 or 32 bits",
        _codes,
        CodeKernel,
        CodeTwin,
        "bfloat16 products (avx512bf16; amx from 4 rows on) or float32, float32 sums",
    ),
    (
        _CODES,
        "fp8, fp4 per token or in the weight's groups (MXFP8, MXFP4, NVFP4, FP8 blocks)",
        _floats(lambda x: x.dynamic),
        CodeKernel,
        CodeTwin,
        _EXACT,
    ),
    (_CODES, "fp8, fp4 per tensor, static", _floats(lambda x: not x.dynamic), CodeKernel, CodeTwin, _EXACT),
    (
        _INTEGERS,
        "int2-8 per token",
        _integers(lambda x: x.dynamic and not x.threshold),
        IntKernel,
        IntTwin,
        "exact integer products, float32 scales",
    ),
    (
        _INTEGERS,
        "int2-8, uint2-8 per tensor, static, integer zero points",
        _integers(lambda x: not x.dynamic and not x.clusters),
        IntKernel,
        IntTwin,
        "exact integer products, float32 scales",
    ),
    (
        _INTEGERS,
        "int2-8, uint2-8 in clusters of channels, static (RPTQ)",
        _integers(lambda x: x.clusters > 0),
        IntKernel,
        IntTwin,
        "exact integer products, a scale for each run with one group and one cluster",
    ),
    (
        _INTEGERS,
        "int2-8 per token, channels above a threshold apart (LLM.int8())",
        _integers(lambda x: x.threshold > 0),
        IntKernel,
        IntTwin,
        "exact integer products; those channels in the dtype of the inputs, their columns dequantized",
    ),
)


def register_linear() -> None:
    """Put the rows into the table. Done when this module is imported."""
    for weights, inputs, refuse, kernel, twin, arithmetic in _ROWS:
        register_operator(Operator("linear", (weights, inputs), kernel, "cpu", False, refuse, arithmetic))
        register_operator(Operator("linear", (weights, inputs), twin, ANY, True, refuse, "float64"))


def find_linear(weight: QuantSpec, inputs: QuantSpec | None, device: str, *, reference: bool = False) -> Operator | str:
    """The row for a layer's specs, or why there is none. Its kernel makes a `PackedKernel` of (weight, quantizer)."""
    return find_serving("linear", (weight, inputs), device, reference=reference)


register_linear()
