"""Min-max: the limits are the smallest and the largest element, so nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.numerics.ranges.base import Range

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec

_VECTOR = 32  # torch's reductions are slow on rows shorter than this


@dataclass(frozen=True)
class MinMax(Range):
    """Nothing is clipped; one outlier stretches the whole tile. A grid symmetric about 0 gets symmetric limits."""

    name = "minmax"

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if spec.symmetric and spec.low == -spec.high:
            largest = _largest(tiles.abs())
            return -largest, largest
        return _largest(tiles.neg()).neg_(), _largest(tiles)


def _largest(tiles: Tensor) -> Tensor:
    """`amax` over the last axis (NaN wins), short rows halved by vector operations first."""
    while tiles.shape[-1] < _VECTOR and tiles.shape[-1] % 2 == 0:
        half = tiles.shape[-1] // 2
        tiles = torch.maximum(tiles[..., :half], tiles[..., half:])
    return tiles.amax(dim=-1)
