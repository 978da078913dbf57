"""The guard: of several solvers' results for a layer, the one with the least measured error, never worse than RTN's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.numerics import QuantSpec
from bitgrain.solvers.base import Moments, Solution, Solver
from bitgrain.solvers.linalg import check_hessian
from bitgrain.solvers.objective import layer_error, quadratic
from bitgrain.solvers.rtn import RoundToNearest


def solve_guarded(
    weight: Tensor,
    spec: QuantSpec,
    moments: Moments,
    solvers: Sequence[Solver],
    *,
    target: Tensor | None = None,
    outer_scale: Tensor | None = None,
    name: str = "weight",
) -> Solution:
    """The best of what `solvers` and RTN find, by tr((T - Q) H (T - Q)^T) with the undamped H.

    weight   [out, in]; RTN rounds it, with the spec's own range
    target   [out, in]: T, which the solvers round (see `target_weight`); None is `weight`
    moments  of the layer's inputs

    The figures are the winner's own and "loss" and "rtn_loss", both relative to tr(W H W^T) (0 where that is 0); its
    notes are kept. Of equal losses RTN's wins, then the earlier solver's. Raises what the solvers raise, and
    NumericsError for statistics with NaN or Inf.
    """
    check_hessian(moments.hessian, weight.shape[1], name)
    goal = (weight if target is None else target).to(torch.float32)
    hessian = moments.hessian.to(torch.float32)
    rtn = RoundToNearest().solve(weight, spec, moments, outer_scale=outer_scale, name=name)
    best, best_error = rtn, layer_error(goal, rtn.q, hessian)
    rtn_error = best_error
    for solver in solvers:
        found = solver.solve(goal, spec, moments, outer_scale=outer_scale, name=name)
        error = layer_error(goal, found.q, hessian)
        if error < best_error:
            best, best_error = found, error
    power = float(quadratic(weight.to(torch.float32), hessian).sum().item())
    figures = (
        {"loss": best_error / power, "rtn_loss": rtn_error / power} if power > 0 else {"loss": 0.0, "rtn_loss": 0.0}
    )
    return Solution(best.q, best.method, {**best.figures, **figures}, best.notes)
