"""Scales in plain storage: rounded to a float dtype. (Scales that are quantized themselves: `quantize.store_scale`.)"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.numerics.formats import E8M0, FloatFormat, Format

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec

_BIASED_ONE = 127


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """`scale` (float32, ideal) as the nearest number that its storage can hold; for nested storage, unchanged.

    E8M0 takes the smallest power of two under which the tile's largest number does not round past the format's maximum:
    2 ** (floor(log2(s * max / overflow)) + 1). For E2M1 this is the OCP MX rule after the group's maximum has been
    rounded to the element's mantissa, as vLLM and compressed-tensors do.
    A scale that would become 0 becomes the smallest number of the storage dtype, with its sign: the floor of float16 is
    2**-24, so that numbers below 2**-25 are lost.
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
    floored = rounded.abs().clamp(min=spec.scale.smallest_positive).copysign(scale)
    return torch.where(scale != 0, floored, rounded)


def check_scale(scale: Tensor, spec: QuantSpec, name: str) -> None:
    """NumericsError if a scale is beyond the largest number of its storage dtype."""
    if not isinstance(spec.scale, Format):
        return
    limit = 2.0**127 if spec.scale == E8M0 else spec.scale.maximum
    sizes = scale.abs()
    beyond = int((sizes > limit).sum().item())
    if beyond:
        raise NumericsError(
            f"{name}: {beyond} of {scale.numel()} scales overflow {spec.scale} (largest {float(sizes.max()):.4g}, "
            f"limit {limit:.4g}); store the scales in float32 or bfloat16"
        )


def encode_scale(scale: Tensor, spec: QuantSpec, name: str = "tensor") -> Tensor:
    """Ideal scales (float32; 0 for an all-zero tile) in the torch dtype of their plain storage.

    An all-zero tile gets the scale 1, so that its zeros are exact; formats without a zero get 0.
    """
    assert isinstance(spec.scale, FloatFormat)
    dtype = spec.scale.torch_dtype
    assert dtype is not None
    check_scale(scale, spec, name)
    rounded = torch.where(scale != 0, round_scale(scale, spec), scale_of_zeros(scale, spec))
    if spec.scale == E8M0:  # the exponent field of a float32 is the E8M0 code
        codes = (rounded.view(torch.int32) >> 23).clamp(0, 2 * _BIASED_ONE)
        return codes.to(torch.uint8).view(dtype)
    return rounded.to(dtype)


def decode_scale(stored: Tensor) -> Tensor:
    """Plainly stored scales as float32."""
    if stored.dtype is torch.float8_e8m0fnu:
        exponent = stored.view(torch.uint8).to(torch.int32) - _BIASED_ONE
        return torch.ldexp(torch.ones(stored.shape, device=stored.device), exponent)
    return stored.to(torch.float32)


def scale_of_zeros(scale: Tensor, spec: QuantSpec) -> Tensor:
    """What an all-zero tile's scale is, in the shape of `scale`."""
    return torch.ones_like(scale) if spec.format.has_zero else torch.zeros_like(scale)
