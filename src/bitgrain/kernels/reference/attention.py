"""The twin of `kernels.attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Arguments and result as of `kernels.attention.attend_dense`; computed in float64 and rounded once."""
    batch, heads, queries, _ = query.shape
    groups, tokens = key.shape[1:3]
    repeat = heads // groups
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (key, value))
    scores = query.double() @ k.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(batch, heads, queries, tokens, dtype=torch.bool)
    if causal:
        seen = seen.tril(tokens - queries)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = seen & (mask > torch.finfo(mask.dtype).min)
        scores = scores + mask.double()
    scores = scores.masked_fill(~seen, -torch.inf)
    rest = torch.full((batch, heads, queries, 1), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        rest = sinks.double().view(1, -1, 1, 1).expand_as(rest)
    weights = torch.cat([scores, rest], dim=-1)
    weights = torch.exp(weights - weights.amax(-1, keepdim=True).clamp(min=-1e300))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weights[..., :-1] @ v).transpose(1, 2).to(query.dtype).contiguous()
