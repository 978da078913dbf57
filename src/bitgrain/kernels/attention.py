"""Attention of a few queries over many tokens of the past (decoding), on the CPU: softmax(scaling Q K^T) V.

Products and sums are in float32. Results are the same for any number of threads. The twin is `reference.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, address_of, native
from bitgrain.kernels.packed_states import PackedStates

MOST_QUERIES = 16
"""Beyond so many tokens of queries, products of whole matrices are faster."""


def attend_dense(
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
    """query [batch, heads, queries, size], key [batch, groups, tokens, size], value [batch, groups, tokens, v size] ->
    [batch, queries, heads, v size], contiguous, in the dtype of `query`.

    All float32, bfloat16 or float16, key and value of one dtype; any strides as long as the last axis is contiguous.
    mask     [batch or 1, heads or 1, queries or 1, tokens]: bool, True where a token is seen, or added to the scores
    causal   the last query sees all tokens, the one before it all but the last
    softcap  scores become softcap tanh(score / softcap); sinks [heads]: a score more in each row, without a value
    A query that sees no token gives zeros. Raises KernelError for shapes and dtypes that do not fit.
    """
    batch, groups, tokens, _ = key.shape
    if key.shape[3] != query.shape[3] or value.shape[:3] != key.shape[:3] or key.dtype != value.dtype:
        raise KernelError(
            f"queries {list(query.shape)}, keys {list(key.shape)} {key.dtype} and values {list(value.shape)} "
            f"{value.dtype} do not fit each other"
        )
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    job, out, alive = job_of(
        query, (batch, groups, tokens), value.shape[3], scaling=scaling, mask=mask, causal=causal, softcap=softcap,
        sinks=sinks,
    )  # fmt: skip
    native().attend_dense(
        job, _kind(key), tokens, key.data_ptr(), key.stride()[:3], value.data_ptr(), value.stride()[:3],
        torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return out


def attend_packed(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    *,
    scaling: float,
    place: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same with packed keys and values, of as many tokens and bits; they are never unpacked in memory.

    place  (first, count) of the memory's tokens; None: all that are held

    Queries, and weights times the scales of values, become whole numbers of 16 bits (24 where queries are float32), and
    products with codes are exact. With u = 2^-15 (2^-23), a score is off by up to u scaling max|q| sum_c |k_c|, and a
    weight by up to u times the largest in its run of 256 tokens times the largest scale in its tile of 64.
    """
    first, count = (key.first, key.tokens) if place is None else place
    sides = [(one.batch, one.heads, one.bits, one.first + one.tokens) for one in (key, value)]
    if sides[0] != sides[1] or first < 0 or first + count > key.first + key.tokens:
        raise KernelError(f"packed keys and values do not belong together, or do not hold tokens {first}+{count}")
    if key.size != query.shape[3]:
        raise KernelError(f"queries {list(query.shape)} do not fit keys of {key.size} channels")
    job, out, alive = job_of(
        query, (key.batch, key.heads, count), value.size, scaling=scaling, mask=mask, causal=causal, softcap=softcap,
        sinks=sinks,
    )  # fmt: skip
    native().attend_packed(job, key.handle, value.handle, first, count, torch.get_num_threads())
    del alive
    return out


def job_of(
    query: Tensor,
    past: tuple[int, int, int],
    v_size: int,
    *,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Any, Tensor, tuple[Tensor | None, ...]]:
    """The native job, its result, and tensors that it points into. past: (batch, groups, tokens)."""
    batch, heads, queries, size = query.shape
    if batch != past[0] or heads % past[1]:
        raise KernelError(f"queries {list(query.shape)} cannot read the keys of {past[0]} texts with {past[1]} heads")
    query = query if query.stride(3) == 1 else query.contiguous()
    out = query.new_empty(batch, queries, heads, v_size)
    kind, mask_stride = 0, (0, 0, 0)
    if mask is not None:
        expected = (batch, heads, queries, past[2])
        if mask.ndim != 4 or any(one not in (1, full) for one, full in zip(mask.shape, expected, strict=True)):
            raise KernelError(f"a mask of shape {list(mask.shape)} does not fit {list(expected)}")
        if mask.dtype != torch.bool:
            mask = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
        mask = mask.expand(*mask.shape[:3], past[2])
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        kind = 1 if mask.dtype == torch.bool else 2
        a, b, c = (0 if one == 1 else step for one, step in zip(mask.shape[:3], mask.stride(), strict=False))
        mask_stride = (a, b, c)
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
        if sinks.shape != (heads,):
            raise KernelError(f"sinks of shape {list(sinks.shape)} are given for {heads} heads")
    b, t, h, _ = out.stride()
    job = native().AttentionJob.of(
        query.data_ptr(), _kind(query), query.stride()[:3], (batch, heads, past[1], queries), size, v_size, scaling,
        softcap or 0.0, causal, kind, address_of(mask), mask_stride,
        address_of(sinks), out.data_ptr(), (b, h, t),
    )  # fmt: skip
    return job, out, (query, mask, sinks)


def _kind(x: Tensor) -> int:
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise KernelError(f"CPU kernels take float32, bfloat16 or float16 on the CPU, not {x.dtype} on {x.device}")
    return DTYPES[x.dtype]
