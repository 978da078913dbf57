"""The affine map between a tensor's numbers and a format's, x = s * (v - z), for quantize and the range searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.numerics.formats import FloatFormat, Format
from bitgrain.numerics.scales import round_scale

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


def scaled(tiles: Tensor, steps: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """tiles / steps + zero, float32, before rounding; a step of 0 counts as 1.

    tiles [..., elements], steps and zero [...] (`zero` in storage: codes or real numbers).
    """
    result = tiles / steps.masked_fill(steps == 0, 1.0).unsqueeze(-1)
    if zero is not None:
        result = result.add_(zero.to(torch.float32).unsqueeze(-1))
    return result.clamp_(min=spec.low) if spec.restricted else result


def to_grid(tiles: Tensor, steps: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The format's numbers v (float32) nearest to tiles / steps + zero."""
    return spec.format.round(scaled(tiles, steps, zero, spec))


def to_codes(tiles: Tensor, steps: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The codes of `to_grid`."""
    return spec.format.to_codes(scaled(tiles, steps, zero, spec))


def from_grid(values: Tensor, steps: Tensor, zero: Tensor | None) -> Tensor:
    """s * (v - z); overwrites `values`."""
    if zero is not None:
        values = values.sub_(zero.to(torch.float32).unsqueeze(-1))
    return values.mul_(steps.unsqueeze(-1))


def store_zero(zero: Tensor | None, ideal: Tensor, actual: Tensor, spec: QuantSpec) -> Tensor | None:
    """The zero point in its storage, adjusted from the ideal scale to the scale as stored (z counts in steps of it).

    Minima are in float32 still: `quantize.store_offset` stores them.
    """
    if zero is None:
        return None
    ratio = torch.where((ideal > 0) & (actual > 0), ideal / actual, torch.ones_like(ideal))
    adjusted = spec.low + (zero - spec.low) * ratio
    if spec.zero_point == "minimum":
        return (adjusted * actual).clamp(min=spec.least_minimum)
    if spec.zero_point == "integer":
        # an all-zero tile: any zero point gives exact zeros as long as the codes equal it
        return spec.format.to_codes(adjusted)
    return real_zero(adjusted, spec)


def real_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    """Real zero points in the dtype of the scales; one beyond its numbers becomes the largest of them."""
    storage = spec.scale_format
    dtype = (storage.torch_dtype if isinstance(storage, FloatFormat) else None) or torch.float32
    largest = torch.finfo(dtype).max
    return zero.clamp(-largest, largest).to(dtype)


def as_stored(scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """What an ideal scale and zero point become in storage, as float32 steps and stored zero: for trying candidates.

    Nested scales and minima are left as they are: how they are rounded depends on all the others. Minima come as the
    real zero points that they amount to.
    """
    steps = torch.where(scale != 0, round_scale(scale, spec), torch.ones_like(scale))
    if isinstance(spec.scale, Format) and not spec.format.has_zero:
        steps = steps.masked_fill(scale == 0, 0.0)
    stored = store_zero(zero, scale, steps, spec)
    if stored is not None and spec.minimum is not None:
        if isinstance(spec.minimum, FloatFormat) and spec.minimum.mantissa_bits < 23:
            stored = spec.minimum.round(stored)
        stored = as_zero(stored, steps)
    return steps, stored


def as_zero(minimum: Tensor, steps: Tensor) -> Tensor:
    """The real zero point that a minimum amounts to, m / s; a step of 0 counts as 1."""
    return minimum / steps.masked_fill(steps == 0, 1.0)
