"""The twin of `kernels.gram`, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def add_gram(hessian: Tensor, x: Tensor) -> Tensor:
    """hessian += x^T x, in place, both triangles; BLAS need not round them alike."""
    x = x.to(torch.float32)
    return hessian.addmm_(x.T, x)


def mirror(hessian: Tensor) -> Tensor:
    """The upper triangle on both sides, in place."""
    lower = torch.ones_like(hessian, dtype=torch.bool).tril_(-1)
    return hessian.copy_(torch.where(lower, hessian.T, hessian))
