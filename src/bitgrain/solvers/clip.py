"""Clipping for the sake of the outputs: limits inside the smallest and largest weight that lower tr(dW H dW^T).

mode "grid": each group alone, both ends cut at f times its largest magnitude, f from 1 downwards; the objective is the
error of the group's own part of the outputs, dW_g H_gg dW_g^T (AWQ, arXiv 2306.00978, in the authors' code).

mode "learned": from there on, the lower and upper limit of each tile are the extremes times sigmoid(b) and sigmoid(g),
and b and g are learned by gradient descent through the rounding (OmniQuant, arXiv 2308.13137, section 3.2, equation 2).
The authors train on the error of a block's outputs; here the objective is that of one layer, which H gives for all
tokens at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec, quantize
from bitgrain.numerics.affine import as_stored, from_grid, to_grid
from bitgrain.numerics.formats import Format
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.quantize import check_finite, store_chosen, straight_through
from bitgrain.numerics.ranges import scale_from_limits
from bitgrain.solvers.apart import solve_apart
from bitgrain.solvers.base import Moments, Solution, register_solver, required
from bitgrain.solvers.linalg import check_hessian
from bitgrain.solvers.objective import quadratic, row_errors
from bitgrain.solvers.rtn import round_without_tokens

_ROWS = 4096  # rows that are learned together; fixed, so results never depend on the machine
_STRONGEST, _WEAKEST = 0.05, 0.982  # sigmoid(4), with which the authors begin

Steps = tuple[Tensor, Tensor | None]
"""Ideal scales and real zero points [down, across]."""


@register_solver("clip")
@dataclass(frozen=True)
class Clip:
    """Round to nearest under limits that were found for the layer's inputs.

    mode      "learned" or "grid"
    steps     of Adam (learned)
    rate      its learning rate, falling linearly to 0 (learned)
    grid      how many factors there are between 1 and 0 (grid); AWQ's is 20
    smallest  the smallest factor (grid)

    A row of tiles is never worse on tr(dW H dW^T) than under the spec's own range.
    """

    mode: str = "learned"
    steps: int = 50
    rate: float = 0.05
    grid: int = 20
    smallest: float = 0.5
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("learned", "grid"):
            raise SchemeError(f"clip: mode is learned or grid, not {self.mode!r}")
        if not (self.steps >= 1 and self.rate > 0 and self.grid >= 1 and 0 < self.smallest <= 1):
            raise SchemeError(f"clip: steps, grid >= 1, rate > 0 and 0 < smallest <= 1 are needed, not {self}")

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`. Without tokens the weights are rounded to nearest, and a note says so."""
        moments = required(moments, "clip", name)
        if spec.outliers:
            return solve_apart(self.solve, weight, spec, moments, outer_scale=outer_scale, name=name)
        if moments.tokens == 0:
            return round_without_tokens(weight, spec, outer_scale=outer_scale, name=name)
        x = weight.to(torch.float32)
        check_finite(x, name)
        check_hessian(moments.hessian, x.shape[1], name)
        hessian = moments.hessian.to(torch.float32)
        weights = to_tiles(moments.importance.to(torch.float32).expand(x.shape), spec.granularity)
        start = spec.range.scale(to_tiles(x, spec.granularity, spec.range.fill), spec, weights)
        found = self._try(x, spec, hessian, start)
        if self.mode == "learned":
            with torch.inference_mode(False), torch.enable_grad():  # tensors of an inference have no gradients
                plain = found[0].clone(), None if found[1] is None else found[1].clone()
                found = self._learn(x.clone(), spec, hessian.clone(), plain)
        q = _better(x, spec, hessian, weights, start, found, outer_scale, name)
        return Solution(q, "clip")

    def _learn(self, x: Tensor, spec: QuantSpec, hessian: Tensor, start: Steps) -> Steps:
        """The best scales and zero points that descent passed by, for each row of tiles."""
        scale, zero = start[0].clone(), None if start[1] is None else start[1].clone()
        for rows, bands in _parts(x, spec):
            part = start[0][bands], None if start[1] is None else start[1][bands]
            learned = _Learned(x[rows].contiguous(), spec, hessian, part, self.rate, self.steps)
            best = learned.run()
            scale[bands] = best[0]
            if zero is not None and best[1] is not None:
                zero[bands] = best[1]
        return scale, zero

    def _try(self, x: Tensor, spec: QuantSpec, hessian: Tensor, start: Steps) -> Steps:
        """The best scales and zero points of the grid, for each tile."""
        shape = (x.shape[0], x.shape[1])
        tiles = to_tiles(x, spec.granularity)
        low, high = tiles.amin(dim=-1), tiles.amax(dim=-1)
        largest = torch.maximum(high, -low)
        best, best_zero = start
        error = _tile_errors(x, tiles, spec, hessian, start, shape)
        for i in range(self.grid):
            factor = 1 - i / self.grid
            if factor < self.smallest:
                break
            limit = largest * factor
            found = scale_from_limits(torch.maximum(low, -limit), torch.minimum(high, limit), spec)
            now = _tile_errors(x, tiles, spec, hessian, found, shape)
            better = now < error
            error = torch.where(better, now, error)
            best = torch.where(better, found[0], best)
            if best_zero is not None and found[1] is not None:
                best_zero = torch.where(better, found[1], best_zero)
        return best, best_zero


class _Learned:
    """Some whole rows of tiles, and the strengths of their limits."""

    def __init__(self, x: Tensor, spec: QuantSpec, hessian: Tensor, start: Steps, rate: float, steps: int) -> None:
        self.x, self.spec, self.hessian, self.rate, self.steps = x, spec, hessian, rate, steps
        self.best = start
        self.tiles = to_tiles(x, spec.granularity)
        self.low, self.high = self.tiles.amin(dim=-1), self.tiles.amax(dim=-1)
        self.tile_rows = spec.granularity.tile((x.shape[0], x.shape[1]))[0]
        scale, zero = start
        offset = torch.zeros_like(scale) if zero is None else zero
        ends = (spec.low - offset) * scale, (spec.high - offset) * scale
        strengths = [
            torch.where(extreme == 0, _WEAKEST, end / extreme).clamp(_STRONGEST, _WEAKEST)
            for end, extreme in ((torch.minimum(*ends), self.low), (torch.maximum(*ends), self.high))
        ]
        self.logits = [torch.logit(strength).requires_grad_() for strength in strengths]

    def run(self) -> Steps:
        """Scales and zero points with the lowest objective, for each row of tiles."""
        with torch.no_grad():
            error = self._errors(self._dense(self.best)[0])[0]
        optimizer = torch.optim.Adam(self.logits, lr=self.rate)
        for i in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (1 - i / self.steps)
            lower, upper = (torch.sigmoid(logit) for logit in self.logits)
            dense, steps = self._dense(scale_from_limits(lower * self.low, upper * self.high, self.spec))
            now, slope = self._errors(dense.detach())
            error = self._keep(now < error, now, error, steps)
            optimizer.zero_grad()
            dense.backward(slope)
            optimizer.step()
        return self.best

    def _dense(self, steps: Steps) -> tuple[Tensor, Steps]:
        """W_hat of ideal scales and zero points as they are stored, differentiable by both; and these, detached."""
        scale, zero = steps
        ideal = scale.detach(), None if zero is None else zero.detach()
        stored, stored_zero = as_stored(*ideal, self.spec)
        s = (scale + (stored - scale).detach()).unsqueeze(-1)
        v = self.tiles / s.masked_fill(s == 0, 1.0)
        z = None
        if zero is not None and stored_zero is not None:
            z = (zero + (stored_zero.to(torch.float32) - zero).detach()).unsqueeze(-1)
            v = v + z
        v = straight_through(self.spec.format, v.clamp(self.spec.low, self.spec.high))
        values = (v if z is None else v - z) * s
        return from_tiles(values, self.spec.granularity, tuple(self.x.shape)), ideal

    def _errors(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """tr(dW H dW^T) of each row of tiles, float64 [down], and its gradient by W_hat."""
        change = dense - self.x
        slope = change @ self.hessian
        return _by_band((change * slope).sum(dim=1, dtype=torch.float64), self.tile_rows), slope.mul_(2.0)

    def _keep(self, better: Tensor, now: Tensor, error: Tensor, steps: Steps) -> Tensor:
        zero, new_zero = self.best[1], steps[1]
        if zero is not None and new_zero is not None:
            zero = torch.where(better.unsqueeze(1), new_zero, zero)
        self.best = torch.where(better.unsqueeze(1), steps[0], self.best[0]), zero
        return torch.where(better, now, error)


def _parts(x: Tensor, spec: QuantSpec) -> Iterator[tuple[slice, slice]]:
    """Whole rows of tiles: rows of the matrix, rows of tiles."""
    rows = x.shape[0]
    tile_rows = spec.granularity.tile((rows, 1))[0]
    step = max(1, _ROWS // tile_rows) * tile_rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(start // tile_rows, math.ceil(stop / tile_rows))


def _by_band(errors: Tensor, tile_rows: int) -> Tensor:
    """Sums [rows] -> [down], over the rows of each tile."""
    if tile_rows == 1:
        return errors
    return torch.stack([part.sum() for part in errors.split(tile_rows)])


def _tile_errors(
    x: Tensor, tiles: Tensor, spec: QuantSpec, hessian: Tensor, found: Steps, shape: tuple[int, int]
) -> Tensor:
    """dW_g H_gg dW_g^T of each tile, summed over its rows: float64 [down, across]."""
    steps, zero = as_stored(*found, spec)
    values = from_grid(to_grid(tiles, steps, zero, spec), steps, zero)
    change = x - from_tiles(values, spec.granularity, shape)
    tile_rows, width = spec.granularity.tile(shape)
    columns = [slice(k, min(k + width, shape[1])) for k in range(0, shape[1], width)]
    return torch.stack([_by_band(quadratic(change[:, c], hessian[c, c].contiguous()), tile_rows) for c in columns], 1)


def _better(
    x: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    weights: Tensor,
    start: Steps,
    found: Steps,
    outer_scale: Tensor | None,
    name: str,
) -> QTensor:
    """`found` packed, but for rows of tiles that lose more than under `start`; nested scales: one of the two."""
    tile_rows = spec.granularity.tile((x.shape[0], x.shape[1]))[0]
    first, last = _pack(x, spec, weights, start, outer_scale, name), _pack(x, spec, weights, found, outer_scale, name)
    before, after = (_by_band(row_errors(x, q, hessian), tile_rows) for q in (first, last))
    if not isinstance(spec.scale, Format) or isinstance(spec.minimum, QuantSpec):
        return last if float(after.sum()) < float(before.sum()) else first
    worse = (after > before).unsqueeze(1)
    if not bool(worse.any().item()):
        return last
    zero = None if start[1] is None or found[1] is None else torch.where(worse, start[1], found[1])
    return _pack(x, spec, weights, (torch.where(worse, start[0], found[0]), zero), outer_scale, name)


def _pack(x: Tensor, spec: QuantSpec, weights: Tensor, steps: Steps, outer_scale: Tensor | None, name: str) -> QTensor:
    tiles = to_tiles(x, spec.granularity, math.nan)
    scale, offset = store_chosen(tiles, weights, *steps, spec, name, outer_scale)
    return quantize(x, spec, scale=scale, zero=offset, name=name)
