"""quantize, dequantize, fake_quantize: the three verbs, for every spec.

    x  ~  s * (v - z)      v = round(clamp(x / s + z)), one s (and z) for each tile

All arithmetic is in float32. Rounding is to nearest; ties go to the even code for integers and floats, to the smaller
number for codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericsError, SchemeError
from .formats import FloatFormat
from .granularity import from_tiles, to_tiles
from .qtensor import QTensor
from .scales import round_scale, scale_values, store_scale
from .spec import QuantSpec


def check_finite(x: Tensor, name: str) -> None:
    """NumericsError that names the tensor and counts its NaN and Inf, if it has any."""
    nan, inf = int(torch.isnan(x).sum().item()), int(torch.isinf(x).sum().item())
    if nan or inf:
        raise NumericsError(
            f"{name} holds {nan} NaN and {inf} Inf among {x.numel()} elements; the checkpoint is damaged or overflowed, "
            "repair or re-download it before quantizing"
        )


def choose_scale(
    x: Tensor,
    spec: QuantSpec,
    *,
    importance: Tensor | None = None,
    name: str = "tensor",
    outer_scale: Tensor | None = None,
) -> tuple[Tensor | QTensor, Tensor | None]:
    """Scales and zero points of `x` in their storage: see `QTensor`.

    x            any shape; computed in float32
    importance   non-negative, broadcastable to x (for instance one weight for each input channel), for the ranges that use it
    outer_scale  for nested scales: the scale of the scales, already stored
    Raises NumericsError for NaN, Inf, or a scale that overflows its storage dtype.
    """
    tiles = to_tiles(x.to(torch.float32), spec.granularity)
    weights = None
    if importance is not None:
        weights = to_tiles(importance.to(torch.float32).expand(x.shape), spec.granularity)
    scale, zero = spec.range.scale(tiles, spec, weights)
    if not bool(torch.isfinite(scale).all().item()):
        check_finite(x, name)
    stored = store_scale(scale, spec, name, outer_scale)
    return stored, _store_zero(zero, scale, scale_values(stored), spec)


def _store_zero(zero: Tensor | None, ideal: Tensor, actual: Tensor, spec: QuantSpec) -> Tensor | None:
    """The zero point in its storage, adjusted to the scale as stored (z counts in steps of the scale)."""
    if zero is None:
        return None
    adjusted = spec.low + (zero - spec.low) * torch.where(ideal > 0, ideal / actual, torch.ones_like(ideal))
    if spec.zero_point == "integer":
        # an all-zero tile: any zero point gives exact zeros as long as the codes equal it
        return spec.format.encode(spec.format.round(adjusted))
    storage = spec.scale_format
    return adjusted.to(
        storage.torch_dtype or torch.float32 if isinstance(storage, FloatFormat) else torch.float32
    )


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | QTensor | None = None,
    zero: Tensor | None = None,
    importance: Tensor | None = None,
    outer_scale: Tensor | None = None,
    name: str = "tensor",
) -> QTensor:
    """Codes of `x` (any shape) under `spec`.

    scale, zero  use these (stored form, see `QTensor`) instead of choosing them
    importance, outer_scale, name   see `choose_scale`
    Raises NumericsError (NaN, Inf, scale overflow), SchemeError (given scales of the wrong shape).
    """
    if x.numel() == 0:
        raise SchemeError(f"{name} has no elements (shape {tuple(x.shape)}): there is nothing to quantize")
    if scale is None:
        scale, zero = choose_scale(x, spec, importance=importance, name=name, outer_scale=outer_scale)
    expected = spec.granularity.tiles(tuple(x.shape))
    steps = scale_values(scale)
    if tuple(steps.shape) != expected:
        raise SchemeError(
            f"{name}: scales of shape {tuple(steps.shape)} given, {spec.granularity} needs {expected}"
        )
    tiles = to_tiles(x.to(torch.float32), spec.granularity)
    values = _to_grid(tiles, steps.unsqueeze(-1), zero, spec)
    codes = from_tiles(spec.format.encode(values), spec.granularity, tuple(x.shape))
    return QTensor(codes.contiguous(), scale, zero, spec)


def _to_grid(tiles: Tensor, steps: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The format's numbers nearest to tiles / steps + zero."""
    scaled = tiles / steps.masked_fill(steps == 0, 1.0)
    if zero is not None:
        scaled = scaled.add_(zero.to(torch.float32).unsqueeze(-1))
    if spec.restricted:
        scaled = scaled.clamp_(min=spec.low)
    return spec.format.round(scaled)


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
) -> Tensor:
    """quantize then dequantize, in the dtype of `x`, differentiable: what a low-bit engine would compute.

    scale, zero  float32 [down, across], for static or learned scales; without them they are chosen from `x`
    Gradients: straight-through for x inside the range and 0 outside (Bengio et al., arXiv 1308.3432); for a given scale,
    round(v) - v inside and the clipped code outside (LSQ, arXiv 1902.08153, equation 3); likewise for a real zero.
    """
    tiles = to_tiles(x.to(torch.float32), spec.granularity)
    if scale is None:
        with torch.no_grad():
            weights = None if importance is None else to_tiles(importance.expand(x.shape), spec.granularity)
            ideal, offset = spec.range.scale(tiles, spec, weights)
            if isinstance(spec.scale, QuantSpec):
                scale = scale_values(store_scale(ideal, spec))
            else:
                rounded = round_scale(ideal, spec)
                scale = torch.where(ideal > 0, rounded, torch.full_like(ideal, float(spec.format.has_zero)))
            zero = _store_zero(offset, ideal, scale, spec)
    steps = scale.unsqueeze(-1)
    offset = 0.0 if zero is None else zero.to(torch.float32).unsqueeze(-1)
    clipped = (tiles / steps.masked_fill(steps == 0, 1.0) + offset).clamp(spec.low, spec.high)
    rounded = clipped + (spec.format.round(clipped.detach()) - clipped).detach()
    return from_tiles((rounded - offset) * steps, spec.granularity, tuple(x.shape)).to(x.dtype)
