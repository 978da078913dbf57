"""Percentile: the limits leave out a fixed share of the elements, the outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.ranges.base import Range

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Percentile(Range):
    """`percent` of the elements lie within the limits of each side.

    Symmetric: the percentile of |x|. Asymmetric: the percentiles `percent` and 100 - `percent` of x. Between two order
    statistics the limit is interpolated linearly, at position (n - 1) * percent / 100, as `torch.quantile` does (which
    refuses more than 16 M elements; here any number will do). Only real elements count, not those that fill a cut tile.
    """

    percent: float = 99.9
    name = "percentile"
    fill = math.nan

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise SchemeError(f"percentile: percent lies in (50, 100], not {self.percent}")

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = tiles.isfinite().sum(dim=-1)
        if spec.symmetric:
            high = upper_quantile(tiles.abs(), count, self.percent / 100)
            return -high, high
        low = upper_quantile(-tiles, count, self.percent / 100)
        return -low, upper_quantile(tiles, count, self.percent / 100)


def upper_quantile(x: Tensor, count: Tensor, fraction: float) -> Tensor:
    """Quantile of the last axis of x [..., n], of which `count` [...] elements are real and the others NaN."""
    below_top = (count - 1).to(torch.float64) * (1 - fraction)
    k = min(x.shape[-1], int(below_top.max().item()) + 2)
    top = x.nan_to_num(nan=-math.inf).topk(k, dim=-1).values
    position = below_top.floor()
    first = top.gather(-1, position.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    index = torch.minimum(position.to(torch.int64) + 1, count - 1)
    second = top.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    weight = below_top - position
    return (first.double() * (1 - weight) + second.double() * weight).to(torch.float32)
