"""Min-max: the limits are the smallest and the largest element, so nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Range

if TYPE_CHECKING:
    from ..spec import QuantSpec


@dataclass(frozen=True)
class MinMax(Range):
    """Nothing is clipped; one outlier stretches the whole tile."""

    name = "minmax"

    def limits(
        self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(tiles, dim=-1)
        return low, high
