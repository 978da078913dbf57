"""Columns kept in 16 bits, for solvers that know nothing of them: they are taken out, and the rest is solved.

Kept columns make no error, so they neither give nor take any: the solver sees zeros in their place and inputs that are
independent of all others. Tiles stay where they are, and the zeros stretch no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.numerics import QuantSpec
from bitgrain.numerics.columns import Columns
from bitgrain.numerics.quantize import check_finite
from bitgrain.solvers.base import Moments, Solution, Solver

_TRACE = 1e-6
"""Of the mean of the others' diagonal: not 0, which would make them dead channels, of which the user is told."""

Solve = Callable[[Tensor, QuantSpec, Moments | None, Tensor | None], Solution]
"""(weight, spec, moments, target) -> Solution."""


def solve_beside(
    solve: Solve,
    weight: Tensor,
    spec: QuantSpec,
    index: Tensor,
    moments: Moments | None = None,
    *,
    target: Tensor | None = None,
    name: str = "weight",
) -> Solution:
    """What `solve` finds for a spec that keeps columns, these being `index` (int32 [k], ascending).

    weight, target  float [out, in]; the kept columns are those of the target where there is one. Figures are of the
                    other columns. Raises NumericsError for NaN, Inf, and for what 16 bits cannot hold.
    """
    choice = spec.columns
    assert choice is not None
    goal = weight if target is None else target
    check_finite(goal.to(torch.float32), name)
    kept = Columns.of(goal, index, choice.torch_dtype, name)
    found = solve(
        _without(weight, index),
        replace(spec, columns=None),
        None if moments is None else replace(moments, hessian=_independent(moments.hessian, index)),
        None if target is None else _without(target, index),
    )
    return replace(found, q=replace(found.q, spec=spec, columns=kept))


def solve_matrix(
    solver: Solver,
    weight: Tensor,
    spec: QuantSpec,
    moments: Moments | None = None,
    *,
    magnitude: Tensor | None = None,
    outer_scale: Tensor | None = None,
    name: str = "weight",
) -> Solution:
    """`solver.solve` for every spec, also for those that keep columns.

    magnitude  [in]: mean |x| of each input channel, for columns that are chosen by it. Raises SchemeError without.
    """

    def solve(matrix: Tensor, plain: QuantSpec, known: Moments | None, _: Tensor | None) -> Solution:
        return solver.solve(matrix, plain, known, outer_scale=outer_scale, name=name)

    if spec.columns is None:
        return solve(weight, spec, moments, None)
    return solve_beside(solve, weight, spec, spec.columns.choose(weight, magnitude, name), moments, name=name)


def _without(weight: Tensor, index: Tensor) -> Tensor:
    return weight.index_fill(1, index.to(torch.int64), 0.0)


def _independent(hessian: Tensor, index: Tensor) -> Tensor:
    """The second moments as if the channels `index` had next to no inputs, and none in common with others."""
    places = index.to(device=hessian.device, dtype=torch.int64)
    rest = hessian.index_fill(0, places, 0.0).index_fill(1, places, 0.0)
    rest.diagonal()[places] = _TRACE * float(rest.diagonal().mean().item())
    return rest
