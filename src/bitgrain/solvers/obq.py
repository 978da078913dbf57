"""Optimal Brain Quantization: in each row the weight whose rounding costs least is rounded first. For small layers.

Frantar & Alistarh, arXiv 2208.11580, section 5 and algorithm 3. With G = H^-1 of the weights that are still free,
rounding w_p costs (w_p - q_p)^2 / G_pp, moves the others by -(w_p - q_p) / G_pp * G_:,p, and takes row and column p out
of G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.quantize import check_finite
from bitgrain.solvers.apart import solve_apart
from bitgrain.solvers.base import Moments, Solution, register_solver, required
from bitgrain.solvers.linalg import damp
from bitgrain.solvers.rtn import round_without_tokens
from bitgrain.solvers.steps import fit, per_element
from bitgrain.solvers.storage import Storage

_LARGEST = 1024
_PIECE = 1 << 21  # elements of the inverses that are held at once


@register_solver("obq")
@dataclass(frozen=True)
class OBQ:
    """Exact greedy rounding, cubic in the input features for every row: for layers of up to 1024 input features.

    damping   added to the diagonal of H, relative to its mean
    outliers  round a weight at once when the updates have pushed it beyond the range (section 5 of the paper), before
              there is nothing left that could make up for it
    """

    damping: float = 0.01
    outliers: bool = True
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise SchemeError(f"obq: 0 <= damping <= 1 is needed, not {self.damping}")

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`; scales are chosen from the original weights. Raises SchemeError for a larger layer.

        Without tokens the weights are rounded to nearest, and a note says so.
        """
        moments = required(moments, "obq", name)
        if spec.outliers:
            return solve_apart(self.solve, weight, spec, moments, outer_scale=outer_scale, name=name)
        if weight.shape[1] > _LARGEST:
            raise SchemeError(
                f"{name} has {weight.shape[1]} input features: obq takes up to {_LARGEST}, since its work grows with "
                "their cube for every row; use gptq"
            )
        if moments.tokens == 0:
            return round_without_tokens(weight, spec, outer_scale=outer_scale, name=name)
        x = weight.to(torch.float32)
        check_finite(x, name)
        damped = damp(moments.hessian, self.damping, name=name)
        inverse = torch.cholesky_inverse(damped.lower)
        ideal, zero = fit(x, spec, spec.range, moments.importance)
        storage = Storage.choose(x, spec, ideal, zero, moments.importance, outer_scale, name)
        steps = storage.round(ideal, zero)
        shape = (x.shape[0], x.shape[1])
        scale = per_element(steps.scale, spec.granularity, shape)
        offset = steps.real_zero(spec)
        zeros = None if offset is None else per_element(offset, spec.granularity, shape)
        numbers = torch.empty_like(x)
        step = max(1, _PIECE // (shape[1] * shape[1]))
        for i in range(0, shape[0], step):
            rows = slice(i, i + step)
            part = _Rows(spec, scale[rows], None if zeros is None else zeros[rows])
            numbers[rows] = part.round_all(x[rows], inverse, self.outliers)
        q = storage.pack(spec.format.encode(numbers), steps)
        return Solution(q, "obq", {"damping": damped.damping}, damped.notes)


@dataclass(frozen=True)
class _Rows:
    """Some rows with their scales and zero points [rows, in]."""

    spec: QuantSpec
    scale: Tensor
    zero: Tensor | None

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers nearest to x [rows, in], what they stand for, and whether x lies beyond the range."""
        scaled = x.to(torch.float32) / self.scale.masked_fill(self.scale == 0, 1.0)
        if self.zero is not None:
            scaled += self.zero
        margin = self.spec.format.overflow - self.spec.high
        beyond = (scaled > self.spec.high + margin) | (scaled < self.spec.low - margin)
        numbers = self.spec.format.round(scaled.clamp(min=self.spec.low) if self.spec.restricted else scaled)
        values = numbers if self.zero is None else numbers - self.zero
        return numbers, values * self.scale, beyond

    def round_all(self, weight: Tensor, inverse: Tensor, outliers: bool) -> Tensor:
        """The numbers of every weight, float32 [rows, in]."""
        rows, n = weight.shape
        x = weight.double()
        g = inverse.expand(rows, n, n).clone()
        free = torch.ones(rows, n, dtype=torch.bool, device=x.device)
        found = torch.empty_like(weight)
        line = torch.arange(rows, device=x.device)
        for _ in range(n):
            numbers, values, beyond = self._nearest(x)
            error = x - values.double()
            diagonal = g.diagonal(dim1=1, dim2=2)
            cost = torch.where(free, error.square() / diagonal, torch.inf)
            if outliers:  # the worst one of those first
                cost = torch.where(free & beyond, -error.square(), cost)
            p = cost.argmin(dim=1)
            found[line, p] = numbers[line, p]
            free[line, p] = False
            column = g[line, :, p]
            pivot = column[line, p].unsqueeze(1)
            x -= error[line, p].unsqueeze(1) / pivot * column
            g -= (column / pivot).unsqueeze(2) * column.unsqueeze(1)
            g[line, p, :] = 0.0
            g[line, :, p] = 0.0
            g[line, p, p] = 1.0
        return found
