"""softmax(scaling Q K^T) V for many queries at once (prefill), causal or not, without a mask.

bfloat16 inputs: products of bfloat16 numbers where the instruction set has them, sums in float32, softmax weights
rounded to bfloat16; else float32 throughout. The twin is torch's scaled_dot_product_attention in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, native

MOST_FEATURES = 256
"""Of a head."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `prefill_attention` takes these: see there."""
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and max(q.shape[-1], v.shape[-1]) <= MOST_FEATURES
        and q.shape[1] % k.shape[1] == 0
    )


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scaling: float, causal: bool = True, window: int = 0
) -> Tensor:
    """q [b, heads, queries, d], k [b, groups, tokens, d], v [b, groups, tokens, e] -> [b, queries, heads, e].

    Of one dtype (float32, bfloat16, float16); heads are a multiple of groups. causal: the last query sees all tokens,
    the one before it all but the last, and so on. window: a query sees that many tokens, itself included; 0: all.
    Raises KernelError for other dtypes and shapes.
    """
    if not serves(q, k, v) or k.shape[:3] != v.shape[:3] or k.shape[2] < q.shape[2]:
        raise KernelError(f"no prefill attention for {q.dtype} {tuple(q.shape)} over {k.dtype} {tuple(k.shape)}")
    # a subclass may make its numbers when it is asked for them, and forget them: a packed cache's keys do
    q, k, v = (x if type(x) is Tensor and x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, size = q.shape
    out = torch.empty(batch, queries, heads, v.shape[-1], dtype=q.dtype)
    kind = DTYPES[q.dtype]
    native().attend_prefill(
        q.data_ptr(), kind, q.stride()[:3], (batch, heads, k.shape[1], queries), size, v.shape[-1], scaling, causal,
        window, out.data_ptr(), (out.stride(0), out.stride(2), out.stride(1)), kind, k.shape[2], k.data_ptr(),
        k.stride()[:3], v.data_ptr(), v.stride()[:3], torch.get_num_threads(),
    )  # fmt: skip
    return out
