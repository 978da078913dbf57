"""Scales as they are stored: rounded to their storage dtype, or quantized themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NumericsError
from .formats import E8M0, FloatFormat, Format

if TYPE_CHECKING:
    from .qtensor import QTensor
    from .spec import QuantSpec

_BIASED_ONE = 127


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """`scale` (float32, ideal) as the nearest number that its storage can hold; for nested storage, unchanged.

    E8M0 takes the smallest power of two under which the tile's largest number does not round past the format's maximum:
    2 ** (floor(log2(s * max / overflow)) + 1). For E2M1 this is the OCP MX rule after the group's maximum has been
    rounded to the element's mantissa, as vLLM and compressed-tensors do.
    A positive scale that would become 0 becomes the smallest positive number of the storage dtype.
    """
    if not isinstance(spec.scale, Format):
        return scale
    assert isinstance(spec.scale, FloatFormat)
    if spec.scale == E8M0:
        mantissa, exponent = torch.frexp(scale)
        largest = mantissa * spec.high  # in float32, which undoes the rounding of largest / high
        exponent = exponent + torch.frexp(largest / spec.format.overflow).exponent
        rounded = torch.ldexp(torch.ones_like(scale), exponent.clamp(-127, 127))
        return torch.where(scale > 0, rounded, torch.ones_like(scale))
    rounded = scale if spec.scale.mantissa_bits >= 23 else spec.scale.round(scale)
    return torch.where(scale > 0, rounded.clamp(min=spec.scale.smallest_positive), rounded)


def check_scale(scale: Tensor, spec: QuantSpec, name: str) -> None:
    """NumericsError if a scale is beyond the largest number of its storage dtype."""
    if not isinstance(spec.scale, Format):
        return
    limit = 2.0**127 if spec.scale == E8M0 else spec.scale.maximum
    beyond = int((scale > limit).sum().item())
    if beyond:
        raise NumericsError(
            f"{name}: {beyond} of {scale.numel()} scales overflow {spec.scale} (largest {float(scale.max()):.4g}, "
            f"limit {limit:.4g}); store the scales in float32 or bfloat16"
        )


def store_scale(scale: Tensor, spec: QuantSpec, name: str = "tensor", outer: Tensor | None = None) -> Tensor | QTensor:
    """Ideal scales [down, across] (float32; 0 for an all-zero tile) in their storage.

    Plain storage gives a tensor of the storage's torch dtype. Nested storage gives a QTensor; `outer` then fixes the
    scale of the scales (layers that an engine fuses must share it). An all-zero tile gets the scale 1, so that its
    zeros are exact; formats without a zero get 0.
    """
    one = torch.ones_like(scale) if spec.format.has_zero else torch.zeros_like(scale)
    if not isinstance(spec.scale, Format):
        from .quantize import quantize

        inner = quantize(scale, spec.scale, name=f"{name} (scales)", scale=outer)
        if isinstance(spec.scale.format, FloatFormat):  # a scale is divided by: none may be 0
            smallest = torch.full_like(scale, spec.scale.format.smallest_positive)
            filler = spec.scale.format.encode(torch.where(scale > 0, smallest, one))
            inner.codes.copy_(torch.where((inner.dequantize() > 0) & (scale > 0), inner.codes, filler))
        return inner
    check_scale(scale, spec, name)
    assert isinstance(spec.scale, FloatFormat)
    dtype = spec.scale.torch_dtype
    assert dtype is not None
    rounded = torch.where(scale > 0, round_scale(scale, spec), one)
    if spec.scale == E8M0:  # the exponent field of a float32 is the E8M0 code
        codes = (rounded.view(torch.int32) >> 23).clamp(0, 2 * _BIASED_ONE)
        return codes.to(torch.uint8).view(dtype)
    return rounded.to(dtype)


def scale_values(stored: Tensor | QTensor) -> Tensor:
    """Stored scales as float32 [down, across]."""
    if isinstance(stored, Tensor):
        if stored.dtype is torch.float8_e8m0fnu:
            exponent = stored.view(torch.uint8).to(torch.int32) - _BIASED_ONE
            return torch.ldexp(torch.ones(stored.shape, device=stored.device), exponent)
        return stored.to(torch.float32)
    return stored.dequantize()
