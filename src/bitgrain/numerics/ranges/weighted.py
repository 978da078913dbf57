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
from bitgrain.numerics.affine import as_stored
from bitgrain.numerics.ranges.base import Range, scale_from_limits
from bitgrain.numerics.ranges.search import grid_for, real_elements, tile_pieces, tile_products
from bitgrain.numerics.sums import row_sums

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec

_REFITS = 3  # of the best candidate in the end


@dataclass(frozen=True)
class Weighted(Range):
    """The scale (and zero point) with the smallest sum of importance * (x - x_hat)^2 among all that were tried.

    Starts are the min-max limits times factors from 1 down to `smallest`, each followed by `iterations` least-squares
    steps; the best one of all is fitted again in the end. Full-range symmetric integers are tried with both signs of
    the scale (`signs` 2): the negative one gives the one more code to the positive end. Integer zero points are tried
    `shifts` steps up and down as well. Min-max itself is a candidate, so the result is never worse. Without importance
    all elements count the same.
    """

    steps: int = 12
    smallest: float = 0.4
    iterations: int = 1
    signs: int = 2
    shifts: int = 1
    name = "weighted"
    fill = math.nan

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and 0 < self.smallest <= 1 and self.iterations >= 1):
            raise SchemeError(f"weighted: steps, iterations >= 1 and 0 < smallest <= 1 are needed, not {self}")
        if self.signs not in (1, 2) or self.shifts < 0:
            raise SchemeError(f"weighted: signs of 1 or 2 and shifts >= 0 are needed, not {self}")

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale(tiles, spec, importance)
        offset = torch.zeros_like(scale) if zero is None else zero
        ends = (spec.low - offset) * scale, (spec.high - offset) * scale
        return torch.minimum(*ends), torch.maximum(*ends)

    def scale(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.scale`; a scale is negative only where `spec.signed_scale` allows it."""
        x, weights = real_elements(tiles, importance)
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        weights = None if weights is None else weights.reshape(x.shape)
        scale, zero = scale_from_limits(x.amin(dim=-1), x.amax(dim=-1), spec)
        for part in tile_pieces(*x.shape, native=grid_for(spec, x) is not None):
            search = _Search(x[part], None if weights is None else weights[part], spec)
            best = self._run(search, scale[part].clone(), None if zero is None else zero[part].clone())
            scale[part] = best[0]
            if zero is not None and best[1] is not None:
                zero[part] = best[1]
        return scale.view(shape), None if zero is None else zero.view(shape)

    def _run(self, search: _Search, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The best scale and zero point [t]; `scale` and `zero` are those of min-max."""
        spec = search.spec
        low, high = search.x.amin(dim=-1), search.x.amax(dim=-1)
        starts: list[tuple[Tensor, Tensor | None]] = []
        flip = self.signs == 2 and spec.signed_scale
        flipped = scale_from_limits(-high, -low, spec)[0].neg() if flip else scale
        shifts = range(-self.shifts, self.shifts + 1) if spec.zero_point == "integer" else (0,)
        for i in range(self.steps + 1):
            factor = 1 - (1 - self.smallest) * i / self.steps
            starts += [(scale * factor, None if zero is None else zero + d) for d in sorted(shifts, key=abs)]
            starts += [(flipped * factor, None)] if flip else []
        for start in starts:  # the first is min-max
            fitted = search.consider(*start)
            for _ in range(self.iterations - 1):
                fitted = search.consider(*fitted)
            search.consider(*fitted, refit=False)
        assert search.scale is not None
        fitted = search.consider(search.scale, search.zero)
        for _ in range(_REFITS):
            fitted = search.consider(*fitted)
        search.consider(*fitted, refit=False)
        return search.scale, search.zero


class _Search:
    """Tiles [t, n] and the best scale and zero point [t] so far."""

    def __init__(self, x: Tensor, weights: Tensor | None, spec: QuantSpec) -> None:
        self.x, self.weights, self.spec = x, weights, spec
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None
        self._error: Tensor | None = None
        if not spec.symmetric:  # sum of w and of w x
            self._totals = (
                row_sums(torch.ones_like(x) if weights is None else weights),
                row_sums(x if weights is None else weights * x),
            )

    def consider(self, scale: Tensor, zero: Tensor | None, refit: bool = True) -> tuple[Tensor, Tensor | None]:
        """Keeps it where it is better than what is known; gives what fits best the codes it leads to, if asked to."""
        steps, stored = as_stored(scale, zero, self.spec)
        error, wv, wvv, wxv = tile_products(self.x, self.weights, steps, stored, self.spec, refit)
        if self._error is None or self.scale is None:
            self._error, self.scale, self.zero = error, scale, zero
        else:
            better = error < self._error
            self._error = torch.where(better, error, self._error)
            self.scale = torch.where(better, scale, self.scale)
            if zero is not None and self.zero is not None:
                self.zero = torch.where(better, zero, self.zero)
        if not refit:
            return scale, zero
        if zero is None:
            return fit_scale(wvv, wxv, scale), None
        return fit_both(*self._totals, wv, wvv, wxv, scale, zero, self.spec)


def fit_scale(wvv: Tensor, wxv: Tensor, scale: Tensor) -> Tensor:
    """sum(w x v) / sum(w v v), float32 [t]; `scale` where that has no meaning (all v 0) or another sign."""
    fitted = wxv / wvv
    return torch.where((fitted * scale > 0) & fitted.isfinite(), fitted.to(torch.float32), scale)


def fit_both(
    w: Tensor, wx: Tensor, wv: Tensor, wvv: Tensor, wxv: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """The scale and zero point, float32 [t], with the smallest sum of w (x - s (v - z))^2, from sums [t] of products.

    Integer zero points are rounded and unsigned minima not below 0, and the scale is then the best for them. Where the
    fit has no meaning (all weights 0, all codes the same, a scale that is not positive) the given ones stay.
    """
    determinant = w * wvv - wv * wv
    new_scale = (w * wxv - wx * wv) / determinant
    new_zero = (new_scale * wv - wx) / (w * new_scale)
    valid = (determinant > 1e-12 * w * wvv) & (new_scale > 0) & new_scale.isfinite() & new_zero.isfinite()
    new_zero = torch.where(valid, new_zero, zero.double())
    if spec.zero_point == "integer" or spec.least_minimum == 0:
        if spec.zero_point == "integer":
            new_zero = new_zero.round().clamp(spec.low, spec.high)
        else:
            new_zero = new_zero.clamp(min=0.0)
        # x ~ s (v - z) with z fixed
        new_scale = (wxv - new_zero * wx) / (wvv - 2 * new_zero * wv + new_zero * new_zero * w)
        valid &= (new_scale > 0) & new_scale.isfinite()
    return torch.where(valid, new_scale.float(), scale), torch.where(valid, new_zero.float(), zero)
