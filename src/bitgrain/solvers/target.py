"""What the rounded weights of a layer should come close to, when its inputs are no longer those of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.solvers.base import Moments
from bitgrain.solvers.linalg import check_hessian, damp


def target_weight(
    weight: Tensor,
    moments: Moments,
    *,
    inputs: float = 1.0,
    residual: float = 1.0,
    damping: float = 0.05,
    name: str = "weight",
) -> Tensor:
    """W* = argmin E|t - W* x|^2 + l |W* - W|^2 with t = a W x_full + (1 - a) W x + b r: float32 [out, in].

    weight    [out, in], W
    moments   of x, the inputs that the quantized layer will see; `cross` gives E[x_full x^T], `residual` E[r x^T] [out,
              in], r being what the residual stream lacks
    inputs    a: how much of the error of the inputs is undone (GPTAQ, arXiv 2504.02692, equation 7, rounds with this
              target inside the GPTQ loop; here W* is found first, and any solver can round it)
    residual  b: how much of the error of the residual stream is undone by a layer that writes into it
    damping   l relative to the mean of the diagonal of H, so that directions that calibration hardly saw stay

    The solution is W + (a W (C - H) + b R) (H + l I)^-1, in float64. Without `cross` and `residual`, or without tokens,
    `weight` itself is returned. Raises NumericsError (NaN, Inf, statistics that are not positive definite) and
    SchemeError (statistics of another layer), naming the layer.
    """
    cross = moments.cross if inputs else None
    lacking = moments.residual if residual else None
    if (cross is None and lacking is None) or moments.tokens == 0:
        return weight
    hessian = moments.hessian
    check_hessian(hessian, weight.shape[1], name)
    _check(cross, (weight.shape[1], weight.shape[1]), f"{name}: the cross moments of its inputs")
    _check(lacking, tuple(weight.shape), f"{name}: the moments of the residual stream")
    pull = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    if cross is not None:
        pull += inputs * (weight.double() @ (cross.double() - hessian.double()))
    if lacking is not None:
        pull += residual * lacking.double()
    damped = damp(hessian, damping, name=name)
    change = torch.cholesky_solve(pull.t(), damped.lower).t()
    return (weight.double() + change).to(torch.float32).contiguous()


def _check(moment: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    if moment is None:
        return
    if tuple(moment.shape) != shape:
        raise SchemeError(f"{what} have the shape {tuple(moment.shape)}, not {shape}: they belong to another layer")
    if not bool(torch.isfinite(moment).all().item()):
        raise NumericsError(f"{what} hold NaN or Inf; activations overflowed during calibration")
