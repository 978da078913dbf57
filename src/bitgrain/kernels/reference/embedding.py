"""The twin of `kernels.embedding`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def look_up(
    codes: Tensor,
    scale: Tensor,
    table: Sequence[float] | torch.dtype,
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    group: int | None = None,
    zero: Tensor | float | None = None,
    minimum: Tensor | None = None,
    outer: float = 1.0,
) -> Tensor:
    """Rows `ids` of (table[code] - zero) * (scale * outer) - minimum * outer, in float32 and rounded once; equal to the
    kernel's, bit for bit.

    codes [n, k] unsigned, or of FP8 numbers of the dtype `table`; the others as of `CodeEmbedding`.
    """
    k = codes.shape[1]

    def spread(x: Tensor) -> Tensor:
        return x[ids].to(torch.float32).repeat_interleave(group or k, -1)[..., :k]

    if isinstance(table, torch.dtype):
        numbers = codes[ids].view(table).to(torch.float32)
    else:
        numbers = torch.tensor(list(table), dtype=torch.float32)[codes[ids].long()]
    if zero is not None:
        numbers = numbers - (spread(zero) if isinstance(zero, Tensor) else zero)
    scaled = numbers * (spread(scale) * outer)
    return (scaled if minimum is None else scaled - spread(minimum) * outer).to(dtype)
