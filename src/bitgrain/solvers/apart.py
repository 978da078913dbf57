"""Outliers for solvers that know nothing of them: W = S + R, the sparse S is kept and the solver sees R alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.numerics import QuantSpec
from bitgrain.numerics.leave_one_out import find_outliers
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.quantize import check_finite
from bitgrain.solvers.base import Moments, Solution


def solve_apart(
    solve: Callable[..., Solution],
    weight: Tensor,
    spec: QuantSpec,
    moments: Moments | None,
    *,
    outer_scale: Tensor | None = None,
    name: str = "weight",
) -> Solution:
    """What `solve`, which is a solver's, finds for a spec with outliers.

    These are the weights that save most of the weighted error, see `leave_one_out`.
    Since (W - Q) = (R - (Q - S)), the solver's objective for R is its objective for W.
    """
    x, plain = weight.to(torch.float32), replace(spec, outliers=0.0)
    check_finite(x, name)
    importance = None if moments is None else moments.importance
    kept = find_outliers(x, plain, importance, spec.count_outliers(tuple(x.shape)))
    outliers = Outliers.of(kept, x[kept], name)
    rest = x - outliers.add_to(torch.zeros_like(x))
    found = solve(rest, plain, moments, outer_scale=outer_scale, name=name)
    return replace(found, q=replace(found.q, spec=spec, outliers=outliers))
