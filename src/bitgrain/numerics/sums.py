"""Sums that do not depend on the number of threads or on how rows are split into pieces of work."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1024


def row_sums(x: Tensor) -> Tensor:
    """Sum over the last axis in float64: [..., n] -> [...].

    Torch adds one long row in as many parts as there are threads. Here a row is always cut into pieces of 1024, so that
    every partial sum belongs to one thread, and the pieces are added in the same way.
    """
    while x.shape[-1] > _PIECE:
        whole = x.shape[-1] // _PIECE * _PIECE
        pieces = x[..., :whole].unflatten(-1, (-1, _PIECE)).sum(dim=-1, dtype=torch.float64)
        if whole < x.shape[-1]:
            rest = x[..., whole:].sum(dim=-1, keepdim=True, dtype=torch.float64)
            pieces = torch.cat([pieces, rest], dim=-1)
        x = pieces
    return x.sum(dim=-1, dtype=torch.float64)
