"""A QTensor and a quantizer of inputs in the terms of the integer kernels, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bitgrain.kernels.int_linear import IntInputs
from bitgrain.numerics import QTensor, QuantSpec, per_tensor, per_token
from bitgrain.numerics.formats import FP32, FloatFormat, Format, IntFormat
from bitgrain.numerics.qtensor import scale_values, unsigned
from bitgrain.runtime.activations import InputQuantizer

_BOOKS = {"ternary": (0, 1, 2), "binary": (0, 2)}
"""Codebooks that are integers apart from an offset of 1: their codes as codes of 2 bits."""
_KERNEL_BITS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Codes of other widths are held in the next larger one."""


@dataclass(frozen=True)
class IntegerWeight:
    """The arguments of `IntLinear.pack`: w = scale * (code - zero).

    codes    [out, in]: uint8, int8 for 8 bits
    scale    [out, spans] float32, bfloat16 or float16
    zero     one integer, or [out, spans]: uint8 codes, or float32
    lengths  of the spans
    """

    codes: Tensor
    scale: Tensor
    bits: int
    zero: int | Tensor
    lengths: tuple[int, ...]


def refuse_weight(spec: QuantSpec) -> str | None:
    """Why no integer kernel multiplies by such a weight, or None."""
    if _width(spec.format) is None:
        return f"weights in {spec.format}"
    if spec.outliers:
        return f"weights with {100 * spec.outliers:g} % outliers"
    return None


def refuse_inputs(spec: QuantSpec) -> str | None:
    """Why integer kernels do not quantize inputs like this, or None."""
    if not isinstance(spec.format, IntFormat) or spec.format.bits > 8:
        return f"inputs in {spec.format}"
    if isinstance(spec.scale, QuantSpec) or spec.outliers:
        return f"inputs {spec.describe()}"
    if not spec.dynamic:
        fits = spec.granularity == per_tensor() and spec.zero_point != "real"
        return None if fits else f"static inputs {spec.granularity} with {spec.zero_point} zero points"
    if spec.granularity != per_token():
        return f"dynamic inputs {spec.granularity}"
    if not spec.symmetric:
        return "dynamic inputs with zero points"
    if not spec.restricted or spec.scale != FP32:
        return f"dynamic inputs {spec.describe()} of the full range"
    return None


def divide(
    weight: QuantSpec, shape: tuple[int, int], quantizer: InputQuantizer | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the spans, runs of inputs with one weight scale and one input scale, and the group of each."""
    features = shape[1]
    group = weight.granularity.tile(shape)[1]
    ends = {*range(group, features, group), features}
    static = None if quantizer is None else quantizer.static
    if static is not None and static.scale.shape[-1] > 1:  # by channel: clusters
        same = static.scale[0, 1:] == static.scale[0, :-1]
        if static.zero is not None:
            same &= static.zero[0, 1:] == static.zero[0, :-1]
        ends |= {int(place) + 1 for place in (~same).nonzero()}
    stops = sorted(ends)
    lengths = tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True))
    return lengths, tuple((stop - 1) // group for stop in stops)


def integer_inputs(quantizer: InputQuantizer, lengths: Sequence[int]) -> IntInputs:
    """The quantization of inputs that `refuse_inputs` does not refuse, for spans of these lengths."""
    spec = quantizer.spec
    if quantizer.static is None:
        if quantizer.in_own_dtype:  # compressed-tensors: half the width of the full range
            low, high = int(quantizer.all_codes.low), int(quantizer.all_codes.high)
            return IntInputs(low, high, (high - low) / 2)
        return IntInputs(int(spec.low), int(spec.high), spec.high)
    firsts = [0, *accumulate(lengths)][:-1]
    scales = quantizer.static.scale.float().reshape(-1).tolist()
    zeros = None if quantizer.static.zero is None else quantizer.static.zero.reshape(-1).tolist()
    many = len(scales) > 1
    return IntInputs(
        int(quantizer.all_codes.low),
        int(quantizer.all_codes.high),
        scales=tuple(scales[first if many else 0] for first in firsts),
        zeros=tuple(0 if zeros is None else int(zeros[first if many else 0]) for first in firsts),
    )


def integer_weight(q: QTensor, lengths: tuple[int, ...], groups: tuple[int, ...]) -> IntegerWeight:
    """A weight that `refuse_weight` does not refuse, in spans that `divide` gave."""
    spec, (rows, _) = q.spec, q.shape
    bits, offset = _width(spec.format) or 0, 0 if isinstance(spec.format, IntFormat) else 1
    if isinstance(spec.format, IntFormat):
        codes = unsigned(q.codes, spec.format)
        offset = spec.format.code_offset
        if bits == 8:  # held signed
            codes, offset = (codes - 128).view(torch.int8), offset - 128
    else:
        codes = torch.tensor(_BOOKS[spec.format.name], dtype=torch.uint8)[q.codes.to(torch.int64)]
    index = torch.tensor(groups)

    def spread(tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(spec.granularity.tile(q.shape)[0], 0)[:rows].index_select(1, index)

    scale = q.scale if isinstance(q.scale, Tensor) else scale_values(q.scale)
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        scale = scale_values(scale)
    zero: int | Tensor = offset
    if q.zero is not None:
        zero = spread(q.zero)
        if spec.zero_point == "integer" and bits < 8:
            zero = unsigned(zero, spec.format)
        else:
            zero = zero.to(torch.float32) + offset
    return IntegerWeight(codes, spread(scale), bits, zero, lengths)


def stored_weight(
    spec: QuantSpec,
    shape: tuple[int, int],
    unpacked: tuple[Tensor, Tensor, Tensor | None],
    groups: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of a QTensor out of what `IntLinear.unpack` gives.

    Exact for codes, plain scales and integer zero points; other scales and zero points are not what was stored.
    """
    codes, scale, zero = unpacked
    rows = spec.granularity.tile(shape)[0]
    index = torch.tensor([groups.index(group) for group in range(spec.granularity.tiles(shape)[1])])

    def gather(spans: Tensor) -> Tensor:
        return spans[::rows].index_select(1, index)

    if not isinstance(spec.format, IntFormat):
        return (codes // 2 if spec.format.name == "binary" else codes), gather(scale), None
    plain = codes.view(torch.uint8) + 128 if codes.dtype == torch.int8 else codes
    if zero is not None and spec.zero_point == "integer":
        if zero.dtype != torch.uint8:
            zero = (zero + 128).to(torch.uint8)
        zero = _signed(gather(zero), spec.format)
    storage = spec.scale.torch_dtype if isinstance(spec.scale, FloatFormat) else None
    return _signed(plain, spec.format), gather(scale).to(storage or torch.float32), zero


def _signed(plain: Tensor, format: Format) -> Tensor:
    return (plain - format.code_offset).view(torch.int8) if format.code_dtype == torch.int8 else plain


def _width(format: Format) -> int | None:
    """Bits of its codes in the kernels."""
    if isinstance(format, IntFormat):
        return _KERNEL_BITS.get(format.bits)
    return 2 if format.name in _BOOKS else None
