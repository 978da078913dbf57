"""quantize, dequantize, fake_quantize: the three verbs, for every spec.

    x  ~  s * (v - z)      v = round(clamp(x / s + z)), one s (and z) for each tile

All arithmetic is in float32. Rounding is to nearest; ties go to the even code for integers and floats, to the smaller
number for codebooks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.about_mean import quantize_about_mean
from bitgrain.numerics.affine import as_zero, store_zero, to_codes
from bitgrain.numerics.formats import FloatFormat, Format, IntFormat
from bitgrain.numerics.granularity import from_tiles, matrix_shape, to_tiles
from bitgrain.numerics.leave_one_out import fill_gaps, find_outliers, largest
from bitgrain.numerics.nested import Products, has_rows_of_its_own, not_lost, search_nested
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.qtensor import QTensor, scale_values
from bitgrain.numerics.scales import encode_scale, scale_of_zeros
from bitgrain.numerics.spec import QuantSpec


def check_finite(x: Tensor, name: str) -> None:
    """NumericsError that names the tensor and counts its NaN and Inf, if it has any."""
    if bool(torch.isfinite(x.sum()).item()):  # NaN and Inf survive a sum; a finite sum that overflows is counted below
        return
    nan, inf = int(torch.isnan(x).sum().item()), int(torch.isinf(x).sum().item())
    if nan or inf:
        raise NumericsError(
            f"{name} holds {nan} NaN and {inf} Inf among {x.numel()} elements; the checkpoint is damaged or "
            "overflowed, repair or re-download it before quantizing"
        )


def _checked(x: Tensor, name: str) -> Tensor:
    """`x` in float32; SchemeError if it is empty, NumericsError if it has NaN or Inf."""
    if x.numel() == 0:
        raise SchemeError(f"{name} has no elements (shape {tuple(x.shape)}): there is nothing to quantize")
    x = x.to(torch.float32)
    check_finite(x, name)
    return x


def choose_scale(
    x: Tensor,
    spec: QuantSpec,
    *,
    importance: Tensor | None = None,
    name: str = "tensor",
    outer_scale: Tensor | None = None,
) -> tuple[Tensor | QTensor, Tensor | QTensor | None]:
    """Scales, and zero points or minima, of `x` in their storage: see `QTensor`.

    x            any shape; computed in float32
    importance   non-negative, broadcastable to x (for instance one weight for each input channel), for the ranges that
                 use it
    outer_scale  for nested scales: the scale of the scales, already stored
    Raises NumericsError for NaN, Inf, or a scale that overflows its storage dtype; SchemeError for an empty tensor.
    """
    return _choose(_checked(x, name), spec, importance, name, outer_scale)


def _choose(
    x: Tensor,
    spec: QuantSpec,
    importance: Tensor | None,
    name: str,
    outer_scale: Tensor | None = None,
    apart: Tensor | None = None,
) -> tuple[Tensor | QTensor, Tensor | QTensor | None]:
    """`choose_scale` of a float32 tensor that has been checked; elements that are kept `apart` (bool) do not count."""
    weights = None
    if importance is not None:
        weights = to_tiles(importance.to(torch.float32).expand(x.shape), spec.granularity)
    tiles = to_tiles(x, spec.granularity, spec.range.fill)
    if apart is not None:
        tiles = fill_gaps(tiles.masked_fill(to_tiles(apart, spec.granularity), math.nan), spec.range.fill)
    scale, zero = spec.range.scale(tiles, spec, weights)
    real = tiles if apart is not None else to_tiles(x, spec.granularity, math.nan)
    return store_chosen(real, weights, scale, zero, spec, name, outer_scale)


def store_chosen(
    tiles: Tensor,
    weights: Tensor | None,
    ideal: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    name: str = "tensor",
    outer_scale: Tensor | None = None,
) -> tuple[Tensor | QTensor, Tensor | QTensor | None]:
    """Ideal scales and real zero points [down, across] in their storage, which for nested ones looks at the elements.

    tiles, weights  [down, across, n], NaN beyond the edge; weights None: all 1
    """
    if outer_scale is None and has_rows_of_its_own(spec):
        found, minimum = search_nested(spec, ideal, zero, Products.of(tiles, weights, spec, ideal, zero), name)
        return found, store_offset(zero, ideal, found, spec, name) if minimum is None else minimum
    stored = store_scale(ideal, spec, name, outer_scale)
    return stored, store_offset(zero, ideal, stored, spec, name)


def store_scale(scale: Tensor, spec: QuantSpec, name: str = "tensor", outer: Tensor | None = None) -> Tensor | QTensor:
    """Ideal scales [down, across] (float32; 0 for an all-zero tile) in their storage.

    Plain storage gives a tensor of the storage's torch dtype. Nested storage gives a QTensor; `outer` then fixes the
    scale of the scales (layers that an engine fuses must share it).
    """
    if isinstance(spec.scale, Format):
        return encode_scale(scale, spec, name)
    if spec.scale.minimum is not None:
        return quantize_about_mean(scale, spec.scale, f"{name} (scales)")
    inner = quantize(scale, spec.scale, name=f"{name} (scales)", scale=outer)
    if isinstance(spec.scale.format, FloatFormat):  # a scale is divided by: none may be 0
        smallest = torch.full_like(scale, spec.scale.format.smallest_positive)
        filler = spec.scale.format.encode(torch.where(scale > 0, smallest, scale_of_zeros(scale, spec)))
        inner.codes.copy_(torch.where((inner.dequantize() > 0) & (scale > 0), inner.codes, filler))
    elif isinstance(spec.scale.format, IntFormat) and spec.scale.symmetric:
        inner.codes.copy_(not_lost(inner.codes, scale, spec.scale))
    return inner


def store_offset(
    zero: Tensor | None, ideal: Tensor, scale: Tensor | QTensor, spec: QuantSpec, name: str = "tensor"
) -> Tensor | QTensor | None:
    """Real zero points [down, across] of ideal scales as zero points or minima in their storage, for stored scales.

    None if symmetric. Raises NumericsError for minima beyond the largest number of their storage.
    """
    stored = store_zero(zero, ideal, scale_values(scale), spec)
    return stored if stored is None or spec.minimum is None else store_minimum(stored, spec.minimum, name)


def store_minimum(minimum: Tensor, storage: Format | QuantSpec, name: str = "tensor") -> Tensor | QTensor:
    """Minima, float32 [down, across], in their storage: in its torch dtype, or nested."""
    if isinstance(storage, QuantSpec):
        return quantize(minimum, storage, name=f"{name} (minima)")
    assert isinstance(storage, FloatFormat)
    assert storage.torch_dtype is not None
    largest = float(minimum.detach().abs().max())
    if largest > storage.maximum:
        raise NumericsError(f"{name}: minima overflow {storage} (largest {largest:.4g}, limit {storage.maximum:.4g})")
    return minimum.to(storage.torch_dtype)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | QTensor | None = None,
    zero: Tensor | QTensor | None = None,
    importance: Tensor | None = None,
    outer_scale: Tensor | None = None,
    name: str = "tensor",
) -> QTensor:
    """Codes of `x` (any shape) under `spec`.

    scale, zero  use these (stored form, see `QTensor`; `zero` are the minima of a spec that has some) instead of
                 choosing them
    importance, outer_scale, name   see `choose_scale`
    Raises NumericsError (NaN, Inf, scale overflow), SchemeError (empty tensor, given scales of the wrong shape).
    """
    x = _checked(x, name)
    if spec.threshold or spec.clusters:
        raise SchemeError(
            f"{name}: {spec.describe()} is a way to multiply, which fake_quantize computes; it has no codes"
        )
    if spec.columns:
        raise SchemeError(f"{name}: {spec.describe()}: solvers.beside.solve_matrix chooses and keeps columns")
    if spec.ordered:
        raise SchemeError(f"{name}: {spec.describe()}: such files are read, not made; gptq's order 'act' needs none")
    if spec.outliers:
        return _quantize_apart(x, spec, scale, zero, importance, outer_scale, name)
    if scale is None:
        scale, zero = _choose(x, spec, importance, name, outer_scale)
    steps = scale_values(scale)
    expected = spec.granularity.tiles(tuple(x.shape))
    if tuple(steps.shape) != expected:
        raise SchemeError(f"{name}: scales of shape {tuple(steps.shape)} given, {spec.granularity} needs {expected}")
    if (zero is None) != spec.symmetric or (zero is not None and tuple(zero.shape) != expected):
        given = "no zero points" if zero is None else f"zero points of shape {tuple(zero.shape)}"
        raise SchemeError(f"{name}: {given} given, {spec.describe()} needs {'none' if spec.symmetric else expected}")
    offset = None if zero is None else scale_values(zero)
    if spec.minimum is not None and offset is not None:
        offset = as_zero(offset, steps)
    codes = to_codes(to_tiles(x, spec.granularity), steps, offset, spec)
    return QTensor.of(from_tiles(codes, spec.granularity, tuple(x.shape)).contiguous(), scale, zero, spec)


def _quantize_apart(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | QTensor | None,
    zero: Tensor | QTensor | None,
    importance: Tensor | None,
    outer_scale: Tensor | None,
    name: str,
) -> QTensor:
    """`quantize` of a checked tensor under a spec with outliers: those that save most (see `leave_one_out`)."""
    plain, shape = replace(spec, outliers=0.0), tuple(x.shape)
    count, matrix = spec.count_outliers(shape), x.reshape(matrix_shape(shape))
    weights = None if importance is None else importance.to(torch.float32).expand(shape).reshape(matrix.shape)
    if scale is None:
        apart = find_outliers(matrix, plain, weights, count)
        scale, zero = _choose(x, plain, importance, name, outer_scale, apart.view(shape))
    else:
        error = (
            matrix - quantize(x, plain, scale=scale, zero=zero, name=name).dequantize().view(matrix.shape)
        ).square_()
        apart = largest(error if weights is None else error.mul_(weights), count)
    dense = quantize(x.masked_fill(apart.view(shape), 0.0), plain, scale=scale, zero=zero, name=name)
    rest = (matrix - dense.dequantize().view(matrix.shape))[apart]
    return replace(dense, spec=spec, outliers=Outliers.of(apart, rest, name))


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `q` stands for, in its original shape."""
    return q.dequantize(dtype)


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    importance: Tensor | None = None,
    outer_scale: Tensor | None = None,
) -> Tensor:
    """quantize then dequantize, in the dtype of `x`, differentiable: what a low-bit engine would compute.

    scale, zero  float32 [down, across], for static or learned scales; without them they are chosen from `x`. `zero`
                 are the minima of a spec that has some
    outer_scale  see `choose_scale`
    Gradients: straight-through for x inside the range and 0 outside (Bengio et al., arXiv 1308.3432); for a given
    scale, round(v) - v inside and the clipped code outside (LSQ, arXiv 1902.08153, equation 3); likewise for a real
    zero.
    """
    if spec.outliers or spec.columns:
        what = "outliers" if spec.outliers else "kept columns"
        raise SchemeError(f"{spec.describe()}: {what} have no simulation, quantize and dequantize instead")
    if spec.clusters:
        raise SchemeError(f"{spec.describe()}: which channels these are only calibration tells, see StaticInput")
    if x.numel() == 0:
        return x.clone()
    if spec.threshold:
        apart = (x.detach().abs() >= spec.threshold).reshape(-1, x.shape[-1]).any(0)
        rest = fake_quantize(x.masked_fill(apart, 0.0), replace(spec, threshold=0.0), importance=importance)
        return torch.where(apart, x, rest)
    if scale is None:
        with torch.no_grad():
            stored, offset = _choose(x.detach().to(torch.float32), spec, importance, "tensor", outer_scale)
            scale, zero = scale_values(stored), None if offset is None else scale_values(offset)
    tiles = to_tiles(x.to(torch.float32), spec.granularity)
    steps = scale.unsqueeze(-1)
    offset = None if zero is None else zero.to(torch.float32).unsqueeze(-1)
    divisor = steps.masked_fill(steps == 0, 1.0)
    if offset is not None and spec.minimum is not None:
        v = straight_through(spec.format, (tiles / divisor + offset / divisor).clamp(spec.low, spec.high))
        return from_tiles(v * steps - offset, spec.granularity, tuple(x.shape)).to(x.dtype)
    v = tiles / divisor
    v = v if offset is None else v + offset
    v = straight_through(spec.format, v.clamp(spec.low, spec.high))
    v = v if offset is None else v - offset
    return from_tiles(v * steps, spec.granularity, tuple(x.shape)).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, format: Format) -> Tensor:
        # + 0: integers have no negative zero
        return format.round(v).add_(0.0) if isinstance(format, IntFormat) else format.round(v)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(format: Format, v: Tensor) -> Tensor:
    """`format.round(v)`, with the identity as its gradient."""
    return cast(Tensor, _StraightThrough.apply(v, format))


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def replaced(value: Tensor, stored: Tensor) -> Tensor:
    """`stored`, with the identity as its gradient by `value`: how a number is kept that is learned."""
    return cast(Tensor, _Replaced.apply(value, stored))
