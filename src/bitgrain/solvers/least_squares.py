"""Alternating least squares: the nearest codes for a scale, the best scale for these codes, until nothing changes.

Each step can only lower sum w (x - x_hat)^2. For the codebooks of few numbers the minimum is known exactly:

- binary: s = sum(w |x|) / sum(w) (XNOR-Net, arXiv 1603.05279, equation 6);
- ternary: if the k largest |x| are not zero, s = their weighted mean and the loss falls by (sum w |x|)^2 / sum w over
  them; the best k is found by trying all (TWN, arXiv 1605.04711, equation 6, which then approximates it by a threshold
  of 0.7 mean |x|).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, get_format
from bitgrain.numerics.affine import as_stored, to_grid
from bitgrain.numerics.ranges.search import tile_error
from bitgrain.numerics.ranges.weighted import fit_both, fit_scale
from bitgrain.numerics.sums import row_sums
from bitgrain.solvers.apart import solve_apart
from bitgrain.solvers.base import Moments, Solution, register_solver
from bitgrain.solvers.tiles import Tiles

_BINARY, _TERNARY = get_format("binary"), get_format("ternary")


@register_solver("least_squares")
@dataclass(frozen=True)
class LeastSquares:
    """Scales and zero points by least squares, for every format; weighted by the importance of the inputs if known.

    iterations  steps at most; they end when no scale moves any more
    starts      the spec's own range, times each of these factors: the best of all results is kept

    A tile never loses more than under the spec's own range.
    """

    iterations: int = 20
    starts: tuple[float, ...] = (1.0, 0.8, 0.6)
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.starts or not all(start > 0 for start in self.starts):
            raise SchemeError(f"least_squares: iterations >= 1 and factors > 0 as starts are needed, not {self}")

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`; of `moments` only the importance."""
        if spec.outliers:
            return solve_apart(self.solve, weight, spec, moments, outer_scale=outer_scale, name=name)
        tiles = Tiles.of(weight, spec, None if moments is None else moments.importance, name)
        scale, zero = tiles.improved(partial(self._improve, spec=spec))
        return Solution(tiles.pack_better(scale, zero, 2.0, outer_scale, name), "least_squares")

    def _improve(
        self, x: Tensor, counts: Tensor | None, scale: Tensor, zero: Tensor | None, spec: QuantSpec
    ) -> tuple[Tensor, Tensor | None]:
        """The best ideal scale and zero point [t] of tiles [t, n]."""
        best, best_zero = scale, zero
        error = tile_error(x, counts, scale, zero, spec)
        candidates: list[tuple[Tensor, Tensor | None]] = []
        if zero is None and spec.format in (_BINARY, _TERNARY):
            exact = (binary_scale if spec.format == _BINARY else ternary_scale)(x, counts)
            candidates.append((torch.where(exact > 0, exact, scale), None))
        else:
            candidates += [self._alternate(x, counts, scale * factor, zero, spec) for factor in self.starts]
        for found, found_zero in candidates:
            now = tile_error(x, counts, found, found_zero, spec)
            better = now < error
            error = torch.where(better, now, error)
            best = torch.where(better, found, best)
            if best_zero is not None and found_zero is not None:
                best_zero = torch.where(better, found_zero, best_zero)
        return best, best_zero

    def _alternate(
        self, x: Tensor, counts: Tensor | None, scale: Tensor, zero: Tensor | None, spec: QuantSpec
    ) -> tuple[Tensor, Tensor | None]:
        """The fixed point from one start."""
        weighted = x if counts is None else x * counts
        sums = row_sums(torch.ones_like(x) if counts is None else counts), row_sums(weighted)
        for _ in range(self.iterations):
            steps, stored = as_stored(scale, zero, spec)
            v = to_grid(x, steps, stored, spec)
            wv = v if counts is None else v * counts
            wvv, wxv = row_sums(wv * v), row_sums(weighted * v)
            old, old_zero = scale, zero
            if zero is None:
                scale = fit_scale(wvv, wxv, scale)
            else:
                scale, zero = fit_both(*sums, row_sums(wv), wvv, wxv, scale, zero, spec)
            same = torch.equal(scale, old) and (zero is None or old_zero is None or torch.equal(zero, old_zero))
            if same:
                break
        return scale, zero


def binary_scale(x: Tensor, counts: Tensor | None) -> Tensor:
    """The best s for x ~ s * (-1 or 1), float32 [t]; x, counts [t, n]. 0 where nothing counts."""
    total = row_sums(torch.ones_like(x) if counts is None else counts)
    size = x.abs() if counts is None else x.abs() * counts
    return (row_sums(size) / total).nan_to_num(nan=0.0).to(torch.float32)


def ternary_scale(x: Tensor, counts: Tensor | None) -> Tensor:
    """The best s for x ~ s * (-1, 0 or 1), float32 [t]; x, counts [t, n]. 0 where nothing counts."""
    size, index = x.abs().sort(dim=-1, descending=True, stable=True)
    weights = torch.ones_like(size) if counts is None else counts.gather(-1, index)
    sums = (size * weights).double().cumsum(dim=-1)
    totals = weights.double().cumsum(dim=-1)
    gain = (sums.square() / totals).nan_to_num(nan=0.0)
    k = gain.argmax(dim=-1, keepdim=True)
    return (sums.gather(-1, k) / totals.gather(-1, k)).squeeze(-1).nan_to_num(nan=0.0).to(torch.float32)
