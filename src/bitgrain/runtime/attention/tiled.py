"""Attention on quantized Q, K, P and V, tile by tile with an online softmax: the readable twin of fast kernels.

Codes are multiplied as numbers in float32, which is exact: a sum of 256 products of int8 codes stays below 2^24.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import Granularity, QuantSpec, quantize
from bitgrain.numerics.qtensor import scale_values
from bitgrain.runtime.attention.schemes import AttentionScheme


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scheme: AttentionScheme,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scaling Q K^T) V [batch, heads, queries, channels], in the dtype of `query`, computed in float32.

    query  [batch, heads, queries, channels]; key, value [batch, groups, tokens, channels], heads a multiple of groups
    mask   [batch or 1, heads or 1, queries, tokens]: bool, True where a token is seen, or added to the scores
    causal without a mask: the last query sees all tokens, the one before it all but the last
    softcap   scores become softcap tanh(score / softcap); sinks: [heads], a score more in each row, without a value
    A query that sees no token gives zeros. Raises SchemeError for a mask of another shape.
    """
    batch, heads, queries, size = query.shape
    groups, tokens = key.shape[1], key.shape[2]
    _check(query, key, mask)
    q = query.float().view(batch, groups, heads // groups, queries, size) * scaling
    k = key.float()
    constant = None  # of each query's scores
    if scheme.smooth_k:
        middle = k.mean(2, keepdim=True)
        k = k - middle
        if softcap is not None or sinks is not None:  # which see it
            constant = q @ middle.unsqueeze(2).mT
    v, v_scale = _codes(value.float(), scheme.v)
    out = query.new_empty(batch, heads, queries, value.shape[-1], dtype=torch.float32)
    shaped = out.view(batch, groups, heads // groups, queries, -1)
    k_tiles = [_codes(k[:, :, start : start + scheme.k_tile], scheme.k) for start in range(0, tokens, scheme.k_tile)]
    for first in range(0, queries, scheme.q_tile):
        rows = slice(first, min(first + scheme.q_tile, queries))
        part = q[..., rows, :]
        mean = part.mean(-2, keepdim=True) if scheme.smooth_q else None
        codes, scale = _codes(part if mean is None else part - mean, scheme.q)
        state = _Softmax(part, value.shape[-1], None if sinks is None else sinks.float().view(groups, -1, 1))
        for number, (k_codes, k_scale) in enumerate(k_tiles):
            columns = slice(number * scheme.k_tile, min((number + 1) * scheme.k_tile, tokens))
            scores = (codes @ k_codes.unsqueeze(2).mT) * scale * k_scale.unsqueeze(2).mT
            if mean is not None:
                scores = scores + mean @ k[:, :, None, columns].mT
            if constant is not None:
                scores = scores + constant[..., rows, :]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = _masked(scores, mask, causal, rows, columns, queries, tokens)
            state.add(scores, v[:, :, None, columns], scheme.p)
        shaped[..., rows, :] = state.result() * v_scale.unsqueeze(2)
    return out.to(query.dtype)


def _codes(x: Tensor, spec: QuantSpec | None) -> tuple[Tensor, Tensor]:
    """The codes as numbers [.., tokens, channels], and scales that spread over them; rows None: all tokens of x."""
    if spec is None:
        return x, x.new_ones((1,) * x.ndim)
    rows = spec.granularity.rows or x.shape[-2]
    spec = replace(spec, granularity=Granularity(rows, spec.granularity.cols))
    found = quantize(x, spec, name="Q, K or V of attention")
    scales = scale_values(found.scale).view(*x.shape[:-2], x.shape[-2] // rows, -1)
    return spec.format.decode(found.codes), scales


class _Softmax:
    """sum_k exp(score - top) v_k and its normalizer, as tiles come."""

    def __init__(self, part: Tensor, size: int, sinks: Tensor | None) -> None:
        shape = part.shape[:-1]
        self.top = part.new_full(shape, -torch.inf)
        self.total = part.new_zeros(shape)
        if sinks is not None:
            self.top, self.total = sinks.expand(shape).clone(), part.new_ones(shape)
        self.sum = part.new_zeros(*shape, size)

    def add(self, scores: Tensor, values: Tensor, spec: QuantSpec | None) -> None:
        """scores [.., queries, tokens] of a tile, values [.., tokens, channels]."""
        top = torch.maximum(self.top, scores.amax(-1))
        base = top.masked_fill(top == -torch.inf, 0.0)
        weights = torch.exp(scores - base.unsqueeze(-1))
        fade = torch.exp(self.top - base)
        self.total = self.total * fade + weights.sum(-1)
        if spec is not None:
            weights = spec.format.round(weights * spec.high) / spec.high
        self.sum = self.sum * fade.unsqueeze(-1) + weights @ values
        self.top = top

    def result(self) -> Tensor:
        return self.sum / self.total.masked_fill(self.total == 0, 1.0).unsqueeze(-1)


def _check(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    batch, heads, queries, _ = query.shape
    if heads % key.shape[1]:
        raise SchemeError(f"{heads} heads of queries cannot share {key.shape[1]} heads of keys")
    if mask is None:
        return
    expected = (batch, heads, queries, key.shape[2])
    if mask.ndim != 4 or any(one not in (1, full) for one, full in zip(mask.shape, expected, strict=True)):
        raise SchemeError(
            f"a mask of shape {list(mask.shape)} is given, {list(expected)} is needed, with 1 for batch or heads that "
            "share it"
        )


def _masked(
    scores: Tensor, mask: Tensor | None, causal: bool, rows: slice, columns: slice, queries: int, tokens: int
) -> Tensor:
    """scores [batch, groups, heads of a group, queries, tokens] of a tile, -inf where nothing is seen."""
    if mask is None:
        if not causal:
            return scores
        last = torch.arange(rows.start, rows.stop, device=scores.device) + tokens - queries
        seen = torch.arange(columns.start, columns.stop, device=scores.device) <= last.unsqueeze(-1)
        return scores.masked_fill(~seen, -torch.inf)
    part = mask[:, :, rows if mask.shape[2] > 1 else slice(None), columns if mask.shape[3] > 1 else slice(None)]
    part = part.unflatten(1, (scores.shape[1], -1)) if part.shape[1] > 1 else part.unsqueeze(1)
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -torch.inf)
    lowest = torch.finfo(part.dtype).min
    return (scores + part).masked_fill(part <= lowest, -torch.inf)
