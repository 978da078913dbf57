"""How long a context fits: as many tokens as a real cache of that size holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import bitgrain
import zoo
from bitgrain.models.past import Past
from bitgrain.pipeline.context import contexts_for, count_bytes
from bitgrain.runtime.kv_cache import SCHEMES, KVCache

Make = Callable[..., Path]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_are_those_of_a_real_cache(name: str, window: int | None):
    config = transformers.MistralConfig(**zoo.GROUPED, **zoo.HEADS, sliding_window=window)
    past = [Past(2, 32, 32, window)] * 2
    cache = KVCache(name, config)
    for _ in range(130):
        for layer in range(2):
            cache.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), layer)
    predicted = count_bytes(SCHEMES[name], past, 130, torch.float32)
    if window is None or SCHEMES[name].step == 1:
        assert cache.nbytes == predicted
    else:  # blocks that the window has left in part stay, and how many tokens are newest depends on all that came
        assert abs(cache.nbytes - predicted) <= 2 * 2 * 32 * 4 * 2 * SCHEMES[name].step


def test_one_token_more_does_not_fit(readable: Make):
    plan = bitgrain.plan(readable("llama"), "W8A16")
    past = [Past(2, 32, 32, None)] * 2
    found = {one.name: one for one in contexts_for(plan, 1_000_000)}
    for name, scheme in SCHEMES.items():
        tokens = found[name].tokens
        assert tokens is not None
        assert count_bytes(scheme, past, tokens, torch.float32) <= 1_000_000
        assert count_bytes(scheme, past, tokens + 1, torch.float32) > 1_000_000
    assert found["float32"].tokens == 1_000_000 // (2 * 2 * 64 * 4)
    assert {one.tokens for one in contexts_for(plan, 1)} == {0}


def test_schemes_that_do_not_fit_the_heads(readable: Make):
    plan = bitgrain.plan(readable("llama", head_dim=24), "W8A16")
    refused = {one.name: one.refusal for one in contexts_for(plan, 1_000_000) if one.refusal}
    assert list(refused) == ["kivi-int4", "kivi-int2"]
    assert all("do not divide 24" in reason for reason in refused.values())
