"""Prefill attention equals torch's in float64, within the roundings of the inputs' dtype."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import KernelError
from bitgrain.kernels.native import native
from bitgrain.kernels.prefill_attention import prefill_attention


def twin(q, k, v, scaling, causal, window):
    """Attention in float64."""
    queries, tokens = q.shape[2], k.shape[2]
    at, seen = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)[None]
    mask = torch.ones(queries, tokens, dtype=torch.bool)
    if causal:
        mask &= seen <= at
    if window:
        mask &= seen > at - window
    shared = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scaling).transpose(1, 2)


@pytest.mark.parametrize("isa", native().isas())
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    groups=st.sampled_from([1, 2]),
    shared=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 2, 11, 12, 13, 40, 130]),
    before=st.sampled_from([0, 1, 31, 150]),
    size=st.sampled_from([1, 7, 16, 33, 64]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 5, 70]),
)
def test_equals_its_twin(isa, seed, dtype, groups, shared, queries, before, size, causal, window):
    made = torch.Generator().manual_seed(seed)
    window = window if causal else 0
    q = torch.randn(2, queries, groups * shared, size, generator=made).to(dtype).transpose(1, 2)
    k = torch.randn(2, groups, queries + before, size, generator=made).to(dtype)
    v = torch.randn(2, queries + before, groups, size + 2, generator=made).to(dtype).transpose(1, 2)
    known = native().isa()
    native().use_isa(isa)
    try:
        found = prefill_attention(q, k, v, scaling=size**-0.5, causal=causal, window=window)
    finally:
        native().use_isa(known)
    wanted = twin(q, k, v, size**-0.5, causal, window)
    assert found.dtype == dtype
    # softmax weights and the result are rounded to the dtype; in float32 scores of up to about 20 lose 1e-6
    bound = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (found.double() - wanted).abs().max() <= bound * v.double().abs().max()


def test_what_it_does_not_take_is_told():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(KernelError, match="float64"):
        prefill_attention(x.double(), x.double(), x.double(), scaling=1.0)
    with pytest.raises(KernelError, match="no prefill attention"):
        prefill_attention(x, x[:, :, :2], x[:, :, :2], scaling=1.0)


class Forgetful(torch.Tensor):
    """Its numbers are made when they are asked for, and gone when something else is asked."""

    numbers: torch.Tensor
    made: list[torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        (one,) = [arg for arg in args if isinstance(arg, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            for old in one.made:
                old.fill_(torch.nan)
            one.made = [one.numbers.clone()]
            return func(*(one.made[0] if arg is one else arg for arg in args), **(kwargs or {}))


def forgetful(x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        made = x.new_empty(1).as_subclass(Forgetful)
        made.numbers, made.made = x, []
    return made


def test_keys_that_are_there_only_while_they_are_asked_for():
    q, k, v = (torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected = prefill_attention(q, k, v, scaling=0.25)
    assert prefill_attention(q, forgetful(k), forgetful(v), scaling=0.25).equal(expected)
