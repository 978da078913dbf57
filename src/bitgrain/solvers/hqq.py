"""Half-quadratic quantization: the zero point (and the scale) under which |error|^p, p < 1, is small; without data.

H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog/). Minimizing sum |W - W_hat|^p is split by an auxiliary W_e for the error:

    W_e = shrink(W - W_hat, beta)                 shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    zero = mean of v - (W - W_e) / scale          v: the numbers of the codes under the last zero
    beta = kappa * beta

Large errors of outliers go into W_e and no longer move the zero point. The authors hold the scale; with `scales` it
takes the least-squares value for the same codes and W - W_e in each step as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.affine import as_stored, from_grid, to_grid
from bitgrain.numerics.ranges.search import tile_error
from bitgrain.numerics.ranges.weighted import fit_both, fit_scale
from bitgrain.numerics.sums import row_sums
from bitgrain.solvers.apart import solve_apart
from bitgrain.solvers.base import Moments, Solution, register_solver
from bitgrain.solvers.tiles import Tiles


@register_solver("hqq")
@dataclass(frozen=True)
class HQQ:
    """Data-free. Real zero points as the authors have them; integer ones are rounded in each step; symmetric specs
    fit the scale alone.

    norm        p
    beta        weight of W_e's distance to the error in the first step; it counts in units of the weights
    kappa       factor of beta from step to step
    iterations  steps; the authors' settings are norm 0.7, beta 10, kappa 1.01, 20 iterations
    scales      fit the scales too (always so for symmetric specs)
    round_zero  begin with real zero points rounded to integers; None: as the authors do, at 4 bits with scales held

    A tile keeps its start, the spec's range, unless sum |W - W_hat|^p as stored has fallen.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    scales: bool = True
    round_zero: bool | None = None
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (0 < self.norm <= 1 and self.beta > 0 and self.kappa >= 1 and self.iterations >= 1):
            raise SchemeError(f"hqq: 0 < norm <= 1, beta > 0, kappa >= 1 and iterations >= 1 are needed, not {self}")

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`; of `moments` only the importance, and only for ranges that use it."""
        if spec.outliers:
            return solve_apart(self.solve, weight, spec, moments, outer_scale=outer_scale, name=name)
        tiles = Tiles.of(weight, spec, None if moments is None else moments.importance, name)
        if tiles.counts is not None:  # importance chooses the start only
            tiles = replace(tiles, counts=(tiles.counts > 0).to(torch.float32))
        scale, zero = tiles.improved(partial(self._improve, spec=spec))
        return Solution(tiles.pack_better(scale, zero, self.norm, outer_scale, name), "hqq")

    def _improve(
        self, x: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, spec: QuantSpec
    ) -> tuple[Tensor, Tensor | None]:
        """The ideal scale and zero point [t] of tiles [t, n]; `mask` is 0 beyond the edge."""
        start = scale, zero
        count = row_sums(torch.ones_like(x) if mask is None else mask)
        beta = self.beta
        rounded = (not self.scales and spec.format.bits == 4) if self.round_zero is None else self.round_zero
        if zero is not None and rounded:
            zero = zero.round()
        for _ in range(self.iterations):
            steps, stored = as_stored(scale, zero, spec)
            v = to_grid(x, steps, stored, spec)
            error = x - from_grid(v.clone(), steps, stored)
            aim = x - shrink(error, beta, self.norm)
            scale, zero = self._fit(v, aim, mask, count, steps, zero, spec)
            beta *= self.kappa
        before = tile_error(x, mask, *start, spec, self.norm)
        better = tile_error(x, mask, scale, zero, spec, self.norm) < before
        new_zero = None if zero is None or start[1] is None else torch.where(better, zero, start[1])
        return torch.where(better, scale, start[0]), new_zero

    def _fit(
        self,
        v: Tensor,
        aim: Tensor,
        mask: Tensor | None,
        count: Tensor,
        steps: Tensor,
        zero: Tensor | None,
        spec: QuantSpec,
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [t] that are best for the numbers v [t, n] of the codes, which shall mean `aim`."""
        own = v if mask is None else v * mask
        if zero is None:
            return fit_scale(row_sums(own * v), row_sums(own * aim), steps), None
        real = aim if mask is None else aim * mask
        if self.scales:
            return fit_both(
                count, row_sums(real), row_sums(own), row_sums(own * v), row_sums(own * aim), steps, zero, spec
            )
        return steps, ((row_sums(own) - row_sums(real) / steps) / count).to(torch.float32)


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """sign(x) max(0, |x| - |x|^(norm - 1) / beta), which is 0 at 0."""
    size = x.abs()
    return (size - size.pow(norm - 1) / beta).clamp_(min=0).copysign(x)
