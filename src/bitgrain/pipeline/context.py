"""How long a context fits into a given memory, with keys and values kept in so many bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitgrain.models.past import Past, find_past
from bitgrain.models.skeleton import build_skeleton
from bitgrain.pipeline.plan import Plan
from bitgrain.runtime.kv_cache import SCHEMES, CacheScheme

_LONGEST = 1 << 40


@dataclass(frozen=True)
class Context:
    """Of one cache scheme (or the model's own 16 or 32 bits): bytes for 1000 tokens, and how many tokens fit.

    tokens  0: not one; None: any number, as all layers have windows; refusal: why the scheme does not fit the model
    """

    name: str
    bytes_1000: int
    tokens: int | None
    refusal: str | None = None


def contexts_for(plan: Plan, memory: int) -> list[Context]:
    """Each way to keep keys and values of one text in `memory` bytes. Raises ModelError (`models.past`)."""
    past = find_past(build_skeleton(plan.config, plan.trust_remote_code))
    stored = plan.checkpoint.entries[plan.anatomy.weights[0].tensor].dtype
    dtype = torch.bfloat16 if plan.decodes_to_bfloat16 else stored
    found = [Context(str(dtype).removeprefix("torch."), _plain(past, 1000, dtype), _fit(None, past, memory, dtype))]
    for name, scheme in SCHEMES.items():
        sizes = {size for one in past for size in (one.key_size, one.value_size)}
        refusal = next((reason for size in sizes if (reason := scheme.indivisible(size))), None)
        if refusal:
            found.append(Context(name, 0, 0, refusal))
        else:
            found.append(Context(name, count_bytes(scheme, past, 1000, dtype), _fit(scheme, past, memory, dtype)))
    return found


def count_bytes(scheme: CacheScheme, past: Sequence[Past], tokens: int, dtype: torch.dtype) -> int:
    """What a cache of `scheme` holds of a text of `tokens` tokens."""
    each = (one.heads * scheme.count_bytes(one.tokens(tokens), one.key_size, one.value_size, dtype) for one in past)
    return sum(each)


def _plain(past: Sequence[Past], tokens: int, dtype: torch.dtype) -> int:
    return sum(one.heads * one.tokens(tokens) * (one.key_size + one.value_size) * dtype.itemsize for one in past)


def _fit(scheme: CacheScheme | None, past: Sequence[Past], memory: int, dtype: torch.dtype) -> int | None:
    def size(tokens: int) -> int:
        return _plain(past, tokens, dtype) if scheme is None else count_bytes(scheme, past, tokens, dtype)

    low, high = 0, _LONGEST
    if size(high) <= memory:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= memory else (low, middle)
    return low
