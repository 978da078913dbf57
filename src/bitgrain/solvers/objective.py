"""The objective of a layer: how much its outputs move, summed over the tokens, when its weights are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics import QTensor

_PIECE = 256  # columns at a time; only the upper half of the blocks of H is multiplied
_ROWS = 4096


def layer_error(weight: Tensor, other: Tensor | QTensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): with H the mean of x x^T, the mean of |W x - Q x|^2 (OBQ, arXiv 2208.11580, equation 1).

    weight, other [out, in]; hessian [in, in].
    """
    return float(row_errors(weight, other, hessian).sum().item())


def row_errors(weight: Tensor, other: Tensor | QTensor, hessian: Tensor) -> Tensor:
    """The same for each row, float64 [out]: the diagonal of (W - Q) H (W - Q)^T.

    Products are computed in float32 (in float64 where H is float64) and added in float64.
    """
    dense = other.dequantize() if isinstance(other, QTensor) else other
    return torch.cat(
        [
            quadratic(weight[i : i + _ROWS].to(hessian.dtype) - dense[i : i + _ROWS].to(hessian.dtype), hessian)
            for i in range(0, weight.shape[0], _ROWS)
        ]
    )


def quadratic(rows: Tensor, hessian: Tensor) -> Tensor:
    """r H r^T of each row r of `rows` [out, in], float64 [out]; H is symmetric and of the same dtype."""
    columns = rows.t().contiguous()
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    n = hessian.shape[0]
    for start in range(0, n, _PIECE):
        stop = min(start + _PIECE, n)
        part = hessian[start:stop, start:stop] @ columns[start:stop]
        if stop < n:
            part.addmm_(hessian[start:stop, stop:], columns[stop:], alpha=2.0)
        total += part.mul_(columns[start:stop]).sum(dim=0, dtype=torch.float64)
    return total
