"""The tiled twin: exact without quantization, as SageAttention says with it, whatever the tiles, masks and heads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import bitgrain
import zoo
from bitgrain.errors import ModelError, SchemeError
from bitgrain.numerics import fake_quantize
from bitgrain.runtime.attention import (
    SCHEMES,
    AttentionScheme,
    attend,
    attention_of,
    get_attention_scheme,
    set_attention,
)
from bitgrain.runtime.kv_cache import KVCache, past_argument

PLAIN = AttentionScheme("plain", q_tile=16, k_tile=8)


def states(queries: int, tokens: int, heads: int = 4, groups: int = 2, size: int = 16, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries), (groups, tokens), (groups, tokens)
    return [torch.randn(2, a, b, size, generator=generator) for a, b in shapes]


def exact(q: Any, k: Any, v: Any, mask: Any = None, scaling: float = 0.25) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


def relative(found: torch.Tensor, base: torch.Tensor) -> float:
    return float((found - base).norm() / base.norm())


@given(
    queries=st.integers(1, 40),
    more=st.integers(0, 40),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    kind=st.sampled_from(["none", "causal", "bool", "float", "window"]),
)
@settings(max_examples=60, deadline=None)
def test_without_quantization_it_is_attention(queries: int, more: int, heads: tuple[int, int], kind: str):
    tokens = queries + more
    q, k, v = states(queries, tokens, *heads)
    place = torch.arange(queries)[:, None] + more
    seen = torch.arange(tokens)[None] <= place
    if kind == "window":
        seen &= torch.arange(tokens)[None] > place - 5
    if kind == "bool":
        seen = seen & (torch.rand(2, 1, queries, tokens) > 0.3) | torch.eye(queries, tokens, dtype=torch.bool)
    mask = None if kind in ("none", "causal") else seen.expand(2, 1, queries, tokens)
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = exact(q, k, v, None if kind == "none" else seen if kind == "causal" else mask)
    found = attend(q, k, v, PLAIN, scaling=0.25, mask=mask, causal=kind == "causal")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_tiles_matter_only_where_they_share_scales(name: str):
    q, k, v = states(200, 200, size=64)
    scheme = SCHEMES[name]
    found = attend(q, k, v, scheme, scaling=0.125, causal=True)
    other = attend(q, k, v, replace(scheme, k_tile=40), scaling=0.125, causal=True)
    base = exact(q, k, v, torch.ones(200, 200, dtype=torch.bool).tril(), 0.125)
    bound = {"int8": 0.02, "int8-tile": 0.03, "int8-int8": 0.03, "int8-fp8": 0.06}.get(name, 0.3)
    assert relative(found, base) < bound
    if name == "int8":
        torch.testing.assert_close(other, found, rtol=1e-3, atol=1e-4)
    else:
        assert relative(other, found) < bound


def test_it_computes_what_its_specs_say():
    q, k, v = states(24, 24)
    scheme = SCHEMES["int8"]
    smooth = k - k.mean(2, keepdim=True)
    assert scheme.q is not None
    assert scheme.k is not None
    expected = exact(fake_quantize(q * 0.25, scheme.q), fake_quantize(smooth, scheme.k), v, scaling=1.0)
    torch.testing.assert_close(attend(q, k, v, scheme, scaling=0.25), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_in_the_keys_is_taken_out():
    """SageAttention's reason for smoothing K."""
    q, k, v = states(64, 64, size=64)
    shifted = k + 20 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(5))
    base = exact(q, k, v, scaling=0.125)
    rough = replace(SCHEMES["int8"], smooth_k=False)
    errors = [relative(attend(q, keys, v, SCHEMES["int8"], scaling=0.125), base) for keys in (k, shifted)]
    assert errors[1] < 1.1 * errors[0] + 1e-6
    assert relative(attend(q, shifted, v, rough, scaling=0.125), exact(q, shifted, v, scaling=0.125)) > 3 * errors[1]


def test_a_constant_in_the_queries_is_taken_out():
    q, k, v = states(64, 64, size=64)
    q = q + 10 * torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(5))
    base = exact(q, k, v, scaling=0.125)
    rough = replace(SCHEMES["int4-fp8"], smooth_q=False)
    with_it, without = (relative(attend(q, k, v, one, scaling=0.125), base) for one in (SCHEMES["int4-fp8"], rough))
    assert with_it < 0.6 * without


def test_caps_and_sinks():
    q, k, v = states(10, 10)
    scores = torch.tanh(q @ k.repeat_interleave(2, 1).mT * 0.25 / 2.0) * 2.0
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 10, 1)], -1).softmax(-1)[..., :-1]
    found = attend(q, k, v, PLAIN, scaling=0.25, softcap=2.0, sinks=sinks)
    assert relative(found, weights @ v.repeat_interleave(2, 1)) < 1e-4


def test_queries_that_see_nothing_give_zeros():
    q, k, v = states(5, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 2] = False
    found = attend(q, k, v, SCHEMES["int8-fp8"], scaling=0.25, mask=mask)
    assert bool((found[0, :, 2] == 0).all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (3, 1, 5, 5), (5, 5), (2, 3, 5, 5)])
def test_a_mask_of_the_wrong_shape(shape: tuple[int, ...]):
    q, k, v = states(5, 5)
    with pytest.raises(SchemeError, match=r"a mask of shape .* is given, \[2, 4, 5, 5\] is needed"):
        attend(q, k, v, SCHEMES["int8"], scaling=0.25, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma", "phi", "phi3", "gpt2", "opt", "mixtral", "gpt-oss", "bert"]
)
def test_under_transformers(name: str):
    model: Any = zoo.build(name).eval()
    model.config._experts_implementation = "eager"
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        base = model(input_ids=ids, attention_mask=mask)[0]
        with attention_of(model, get_attention_scheme("int8")):
            assert model.config._attn_implementation == "bitgrain_int8"
            found = model(input_ids=ids, attention_mask=mask)[0]
        again = model(input_ids=ids, attention_mask=mask)[0]
    assert torch.equal(again, base)
    live = mask.bool()
    assert 0 < relative(found[live], base[live]) < (0.2 if name in ("mixtral", "qwen3-moe", "gpt-oss") else 0.03)


def test_windows_caps_and_caches_under_transformers():
    small = {**zoo.GROUPED, **zoo.HEADS, "sliding_window": 7}
    torch.manual_seed(0)
    for config, kind in (
        (transformers.MistralConfig(**small), transformers.MistralForCausalLM),
        (transformers.Gemma2Config(**small, attn_logit_softcapping=0.5), transformers.Gemma2ForCausalLM),
    ):
        model: Any = kind(config).eval()
        model.set_attn_implementation("eager")
        ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            base = model(input_ids=ids).logits
            set_attention(model, "int8")
            assert relative(model(input_ids=ids).logits, base) < 0.03
            for cache in (DynamicCache(config=config), KVCache("int8", config)):
                parts = [model(input_ids=part, **{past_argument(model): cache}).logits for part in ids.split(10, dim=1)]
                assert relative(torch.cat(parts, 1), base) < 0.05


def test_by_load_and_by_name(tmp_path: Any):
    folder = zoo.save("llama", tmp_path / "llama")
    model: Any = bitgrain.load(folder, device="cpu", attention="int8-fp8")
    assert model.config._attn_implementation == "bitgrain_int8_fp8"
    ids = torch.randint(3, 100, (2, 12))
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="bitgrain_int8_fp8")
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    with pytest.raises(SchemeError, match="unknown attention scheme 'int9'; did you mean int8"):
        bitgrain.load(folder, device="cpu", attention="int9")
    with pytest.raises(ModelError, match="Linear is not of transformers"):
        set_attention(torch.nn.Linear(2, 2), "int8")
