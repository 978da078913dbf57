"""Scales in a code of their own about their mean: double quantization as in QLoRA (arXiv 2305.14314, section 3).

A spec of scales with minima: x = s * v - m, where -m is the mean of all, the same in each tile, and s the largest
distance from it in the tile. Computed in float32, product before sum, as bitsandbytes does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.packed import float_dtype
from bitgrain.numerics.qtensor import QTensor, scale_values
from bitgrain.numerics.quotient import quotient
from bitgrain.numerics.scales import encode_scale
from bitgrain.numerics.spec import QuantSpec


def quantize_about_mean(x: Tensor, spec: QuantSpec, name: str = "scales") -> QTensor:
    """`x` (float32, finite) under a spec of scales with plainly stored minima.

    Raises NumericsError for a scale that overflows its storage.
    """
    assert spec.minimum is not None
    assert not isinstance(spec.minimum, QuantSpec)
    minimum = -x.mean().to(float_dtype(spec.minimum))
    distance = to_tiles(x + minimum.float(), spec.granularity).abs().amax(dim=-1)
    scale = encode_scale(quotient(distance, spec.high), spec, name)
    return about(x, spec, scale, minimum.expand(scale.shape).clone(memory_format=torch.contiguous_format))


def about(x: Tensor, spec: QuantSpec, scale: Tensor, minimum: Tensor) -> QTensor:
    """`x` under given scales and minima of its tiles, in their storage."""
    tiles = to_tiles(x, spec.granularity)
    scaled = (tiles + minimum.float().unsqueeze(-1)) / scale_values(scale).unsqueeze(-1)
    codes = from_tiles(spec.format.to_codes(scaled.clamp_(spec.low, spec.high)), spec.granularity, tuple(x.shape))
    return QTensor(codes.contiguous(), scale, None, spec, minimum=minimum)
