"""Damped Hessians and their factors: what GPTQ, OBQ and the target of a layer share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError

_LARGEST_DAMPING = 1.0
_SMALLEST_DAMPING = 1e-6
_LEAF = 128


@dataclass(frozen=True)
class Damped:
    """A Hessian that has a Cholesky factor.

    matrix   float64 [in, in]: H + damping * mean(diag H) * I, in the channels' own order
    lower    float64 [in, in]: the Cholesky factor of `matrix` in the order that was asked for
    damping  what was used, relative to the mean of the diagonal
    notes    what the user should know: dead input channels, damping that had to be raised
    """

    matrix: Tensor
    lower: Tensor
    damping: float
    notes: tuple[str, ...]


def check_hessian(hessian: Tensor, in_features: int, name: str = "weight") -> None:
    """NumericsError for NaN, Inf or a negative diagonal, SchemeError for a wrong shape; both name the layer."""
    if tuple(hessian.shape) != (in_features, in_features):
        raise SchemeError(
            f"{name} has {in_features} input features, but the statistics are of shape {tuple(hessian.shape)}: they "
            "belong to another layer"
        )
    finite = bool(torch.isfinite(hessian.sum()).item())  # NaN and Inf survive a sum, which is sooner done than a count
    bad = 0 if finite else int((~torch.isfinite(hessian)).sum().item())
    if bad:
        raise NumericsError(
            f"{name}: {bad} of the {hessian.numel()} second moments of its inputs are NaN or Inf; activations "
            "overflowed during calibration, calibrate in float32 or bfloat16"
        )
    if bool((hessian.diagonal() < 0).any().item()):
        raise NumericsError(f"{name}: the mean of the squares of an input is negative; the statistics are damaged")


def damp(hessian: Tensor, damping: float = 0.01, *, order: Tensor | None = None, name: str = "weight") -> Damped:
    """H + damping * mean(diag H) * I and its Cholesky factor (GPTQ, arXiv 2210.17323, section 3.3, step 3).

    hessian  [in, in], symmetric, positive semi-definite up to rounding
    order    [in]: rows and columns of `lower` are those of the matrix in this order; None is their own

    Inputs that are always zero (dead channels) are cut off from all others: their weights are free, and what a solver
    does with one of them changes no other weight. If the factor does not exist, the damping is raised tenfold until it
    does. Raises NumericsError, naming the layer, if it does not even with damping 1, and for NaN and Inf.
    """
    check_hessian(hessian, hessian.shape[-1], name)
    matrix = hessian.to(torch.float64, copy=True)
    diagonal = matrix.diagonal().clone()
    dead = diagonal == 0
    notes: list[str] = []
    count = int(dead.sum().item())
    if count:
        matrix[dead] = 0.0
        matrix[:, dead] = 0.0
        notes.append(f"{count} input channel{'s are' if count > 1 else ' is'} always zero: rounded to nearest")
    mean = float(diagonal.mean().item()) or 1.0
    used = damping
    while True:
        damped_diagonal = diagonal + used * mean
        matrix.diagonal().copy_(torch.where(dead, used * mean if used > 0 else mean, damped_diagonal))
        # never in place: a failed attempt leaves rubbish behind
        lower, info = torch.linalg.cholesky_ex(matrix if order is None else matrix[order][:, order])
        if int(info.item()) == 0 and bool(torch.isfinite(lower.diagonal()).all().item()):
            break
        if used >= _LARGEST_DAMPING:
            raise NumericsError(
                f"{name}: the second moments of its inputs are not positive definite, even with damping {used:g}; the "
                "statistics are damaged, calibrate again"
            )
        used = min(_LARGEST_DAMPING, max(used * 10, _SMALLEST_DAMPING))
    if used != damping:
        notes.append(f"damping was raised from {damping:g} to {used:g}: its inputs are nearly dependent")
    return Damped(matrix, lower, used, tuple(notes))


def inverse_factor(
    hessian: Tensor, damping: float = 0.01, *, order: Tensor | None = None, name: str = "weight"
) -> tuple[Tensor, Damped]:
    """U, upper triangular, with H^-1 = U^T U for the damped H in `order`: float32 [in, in], computed in float64.

    With J the reversal of the order and J H J = L L^T, U = J L^-1 J: no inverse is formed that would have to be
    factorized again. Also gives what `damp` gave; its `lower` is that of the reversed order. Raises as `damp`.
    """
    given = torch.arange(hessian.shape[0], device=hessian.device) if order is None else order
    damped = damp(hessian, damping, order=given.flip(0), name=name)
    return invert_lower(damped.lower).flip(0, 1).to(torch.float32), damped


def invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n], by halves: a third of the work of solving for the identity."""
    n = lower.shape[0]
    if n <= _LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = n // 2
    top, bottom = invert_lower(lower[:half, :half]), invert_lower(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = top
    inverse[half:, half:] = bottom
    inverse[half:, :half] = -(bottom @ (lower[half:, :half] @ top))
    return inverse
