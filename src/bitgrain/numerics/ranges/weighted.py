"""Importance-weighted search: for each candidate, the scale that is best for the codes it leads to, by least squares.

Given codes v, the scale that minimizes sum w (x - s v)^2 is s = sum(w x v) / sum(w v v); with a minimum as well,
x ~ s v + m, it is the solution of 2 x 2 normal equations. New scales lead to new codes, so the two steps alternate. The
scheme is that of llama.cpp's k-quants (`make_qx_quants` and `make_qkx2_quants` in ggml's quantization code, I.
Kawrakow, 2023). For binary numbers it gives s = mean of |x| (XNOR-Net, arXiv 1603.05279, equation 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.affine import as_stored, to_grid
from bitgrain.numerics.ranges.base import Range, scale_from_limits
from bitgrain.numerics.ranges.search import element_pieces, real_elements, tile_error, tile_pieces
from bitgrain.numerics.sums import row_sums

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Weighted(Range):
    """The scale (and zero point) with the smallest sum of importance * (x - x_hat)^2 among all that were tried.

    Starts are the min-max limits times factors from 1 down to `smallest`, each followed by `iterations` least-squares
    steps. Min-max itself is a candidate, so the result is never worse. Without importance all elements count the same.
    """

    steps: int = 12
    smallest: float = 0.4
    iterations: int = 2
    name = "weighted"
    fill = math.nan

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and 0 < self.smallest <= 1 and self.iterations >= 1):
            raise SchemeError(f"weighted: steps, iterations >= 1 and 0 < smallest <= 1 are needed, not {self}")

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale(tiles, spec, importance)
        offset = torch.zeros_like(scale) if zero is None else zero
        return (spec.low - offset) * scale, (spec.high - offset) * scale

    def scale(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x, weights = real_elements(tiles, importance)
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        weights = None if weights is None else weights.reshape(x.shape)
        scale, zero = scale_from_limits(x.amin(dim=-1), x.amax(dim=-1), spec)
        for part in tile_pieces(*x.shape):
            best = self._search(x[part], None if weights is None else weights[part], spec)
            scale[part] = best[0]
            if zero is not None and best[1] is not None:
                zero[part] = best[1]
        return scale.view(shape), None if zero is None else zero.view(shape)

    def _search(self, x: Tensor, weights: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        low, high = x.amin(dim=-1), x.amax(dim=-1)
        best_scale, best_zero = scale_from_limits(low, high, spec)
        best = torch.full_like(best_scale, math.inf, dtype=torch.float64)

        def consider(scale: Tensor, zero: Tensor | None) -> None:
            nonlocal best, best_scale, best_zero
            error = tile_error(x, weights, scale, zero, spec)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)

        for i in range(self.steps + 1):
            factor = 1 - (1 - self.smallest) * i / self.steps
            scale, zero = scale_from_limits(low * factor, high * factor, spec)
            consider(scale, zero)
            for _ in range(self.iterations):
                scale, zero = least_squares(x, weights, scale, zero, spec)
                consider(scale, zero)
        return best_scale, best_zero


def least_squares(
    x: Tensor, weights: Tensor | None, scale: Tensor, zero: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point that fit best the codes that x [t, n] gets under `scale` and `zero` [t].

    Where the fit has no meaning (all weights 0, all codes the same, a scale that is not positive) the given ones stay.
    """
    steps, stored_zero = as_stored(scale, zero, spec)
    if zero is None:
        wv2, wxv = _sums(x, weights, steps, stored_zero, spec, ("vv", "xv"))
        return _positive(wxv / wv2, scale), None
    w, wx, wv, wv2, wxv = _sums(x, weights, steps, stored_zero, spec, ("1", "x", "v", "vv", "xv"))
    determinant = w * wv2 - wv * wv
    new_scale = (w * wxv - wx * wv) / determinant
    new_zero = (new_scale * wv - wx) / (w * new_scale)
    valid = (determinant > 1e-12 * w * wv2) & (new_scale > 0) & new_scale.isfinite() & new_zero.isfinite()
    new_zero = torch.where(valid, new_zero, zero.double())
    if spec.zero_point == "integer":
        new_zero = new_zero.round().clamp(spec.low, spec.high)
        # x ~ s (v - z) with z fixed
        new_scale = (wxv - new_zero * wx) / (wv2 - 2 * new_zero * wv + new_zero * new_zero * w)
        valid &= (new_scale > 0) & new_scale.isfinite()
    return torch.where(valid, new_scale.float(), scale), torch.where(valid, new_zero.float(), zero)


def _positive(scale: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where((scale > 0) & scale.isfinite(), scale.to(torch.float32), otherwise)


def _sums(
    x: Tensor, weights: Tensor | None, steps: Tensor, zero: Tensor | None, spec: QuantSpec, terms: tuple[str, ...]
) -> list[Tensor]:
    """Weighted sums over each tile, float64 [t], of the products named in `terms` (v: the codes' numbers)."""
    totals = [torch.zeros(x.shape[0], dtype=torch.float64, device=x.device) for _ in terms]
    for piece, w in element_pieces(x, weights):
        v = to_grid(piece, steps, zero, spec)
        weight = torch.ones_like(piece) if w is None else w
        factors = {"1": weight, "x": weight * piece, "v": weight * v}
        for total, term in zip(totals, terms, strict=True):
            total += row_sums(factors[term[0]] if len(term) == 1 else factors[term[0]] * v)
    return totals
