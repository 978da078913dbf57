"""MSE search: shrink the min-max limits as long as the rounding saved outweighs the clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.kernels.tile_search import best_candidates
from bitgrain.numerics.affine import as_stored
from bitgrain.numerics.ranges.base import Range, scale_from_limits
from bitgrain.numerics.ranges.search import grid_for, real_elements, tile_error, tile_pieces

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class MSE(Range):
    """The limits f * low and f * high that lose least, over a grid of factors f from 1 down to `smallest`.

    The loss is the sum of |x - x_hat| ** norm, with x_hat computed from the scale as it is stored (nested scales:
    before they are quantized). Asymmetric: first both ends by the same factor, then each end alone from the best. The
    factor 1 is among the candidates, so the result is never worse than min-max. norm 2.4 is the choice of Frantar et
    al.'s code for GPTQ (arXiv 2210.17323); 2 is the mean squared error.
    """

    norm: float = 2.0
    steps: int = 50
    smallest: float = 0.3
    name = "mse"
    fill = math.nan

    def __post_init__(self) -> None:
        if not (self.norm > 0 and self.steps >= 1 and 0 < self.smallest <= 1):
            raise SchemeError(f"mse: norm > 0, steps >= 1 and 0 < smallest <= 1 are needed, not {self}")

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, mask = real_elements(tiles, None)
        return self.search(x, mask, spec)

    def search(self, tiles: Tensor, weights: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """`limits` of finite tiles [..., n] whose elements count `weights` times (for instance bins of a histogram)."""
        flat = tiles.reshape(-1, tiles.shape[-1])
        count = None if weights is None else weights.reshape(flat.shape)
        low, high = flat.amin(dim=-1), flat.amax(dim=-1)
        grid = grid_for(spec, flat) if self.norm == 2 else None
        for part in tile_pieces(*flat.shape, native=grid is not None):
            x, weights = flat[part], None if count is None else count[part]
            if grid is None:
                low[part], high[part] = self._search(x, weights, low[part], high[part], spec)
            else:
                low[part], high[part] = self._search_natively(x, weights, low[part], high[part], spec, grid)
        return low.view(tiles.shape[:-1]), high.view(tiles.shape[:-1])

    def _search(
        self, x: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, spec: QuantSpec
    ) -> tuple[Tensor, Tensor]:
        best_low, best_high = low, high
        best = tile_error(x, weights, *scale_from_limits(low, high, spec), spec, self.norm)

        def consider(new_low: Tensor, new_high: Tensor) -> None:
            nonlocal best, best_low, best_high
            error = tile_error(x, weights, *scale_from_limits(new_low, new_high, spec), spec, self.norm)
            better = error < best
            best = torch.where(better, error, best)
            best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)

        for factor in self._factors:
            consider(low * factor, high * factor)
        if not spec.symmetric:
            for factor in self._factors:
                consider(low * factor, best_high)
            for factor in self._factors:
                consider(best_low, high * factor)
        return best_low, best_high

    @property
    def _factors(self) -> list[float]:
        return [1 - (1 - self.smallest) * i / self.steps for i in range(1, self.steps + 1)]

    def _search_natively(
        self, x: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, spec: QuantSpec, grid: Any
    ) -> tuple[Tensor, Tensor]:
        """`_search` by the kernel, which tries all candidates [factors, t] of one round while a tile is at hand."""
        factors = torch.tensor(self._factors).unsqueeze(1)
        best_low, best_high = low, high
        best = tile_error(x, weights, *scale_from_limits(low, high, spec), spec)

        def consider(new_low: Tensor, new_high: Tensor) -> None:
            nonlocal best_low, best_high
            ends = new_low.expand(len(factors), -1), new_high.expand(len(factors), -1)
            found = best_candidates(x, weights, *as_stored(*scale_from_limits(*ends, spec), spec), grid, best)
            place = found.clamp(min=0).unsqueeze(0)
            best_low = torch.where(found >= 0, ends[0].gather(0, place)[0], best_low)
            best_high = torch.where(found >= 0, ends[1].gather(0, place)[0], best_high)

        consider(low * factors, high * factors)
        if not spec.symmetric:
            consider(low * factors, best_high)
            consider(best_low, high * factors)
        return best_low, best_high
