"""Quantized caches under transformers' models: pieces, batches, padding, beams, windows, crops, going on, bad use."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

import bitgrain
import zoo
from bitgrain.errors import ModelError, SchemeError
from bitgrain.numerics import QuantSpec, per_tensor
from bitgrain.numerics.formats import IntFormat
from bitgrain.runtime.kv_cache import SCHEMES, CacheScheme, KVCache, cache, past_argument, use_cache
from bitgrain.runtime.kv_cache.layers import QuantizedLayer, QuantizedSlidingLayer

DECODERS = ["llama", "qwen3", "gemma", "phi", "gpt2", "opt", "mixtral", "gpt-oss"]


def build(name: str, **changes: Any) -> Any:
    model = zoo.build(name, **changes).eval()
    model.config._experts_implementation = "eager"
    model.generation_config.eos_token_id = None
    return model


def ids_of(model: Any, tokens: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)


def past_of(model: Any, cache: Any) -> dict[str, Any]:
    return {past_argument(model): cache}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, past: Any, piece: int) -> torch.Tensor:
    parts = ids.split(piece, dim=1)
    return torch.cat([model(input_ids=part, use_cache=True, **past_of(model, past)).logits for part in parts], dim=1)


def spread(found: torch.Tensor, base: torch.Tensor) -> float:
    return float((found - base).std() / base.std())


@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token_is_the_same_as_at_once(name: str):
    model = build(name).double()  # in float32 noise moves numbers over the edge between two codes
    ids = ids_of(model, 20)
    base = logits(model, ids, DynamicCache(config=model.config), 20)
    once = logits(model, ids, KVCache("int4", model.config), 20)
    torch.testing.assert_close(logits(model, ids, KVCache("int4", model.config), 1), once, rtol=1e-4, atol=1e-5)
    assert 0 < spread(once, base) < 0.5
    routed = name in ("mixtral", "gpt-oss")  # a token may go to another expert
    assert 0 < spread(logits(model, ids, KVCache("int8", model.config), 20), base) < (0.2 if routed else 0.03)


def test_kivi_in_pieces_of_its_groups_is_the_same_as_token_by_token():
    model = build("llama")
    ids = ids_of(model, 150)
    steps = logits(model, ids, KVCache("kivi-int2", model.config), 1)
    torch.testing.assert_close(logits(model, ids, KVCache("kivi-int2", model.config), 32), steps, rtol=1e-4, atol=1e-5)
    base = logits(model, ids, DynamicCache(config=model.config), 150)
    assert torch.allclose(steps[:, :64], base[:, :64], atol=1e-5)  # nothing is old yet
    assert spread(steps[:, 96:], base[:, 96:]) > 0


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("window", [9, 40])
def test_windows(scheme: str, window: int):
    """Mistral-like: every layer has a window; the cache holds no more than it and what shares a block with it."""
    config = transformers.MistralConfig(**zoo.GROUPED, **zoo.HEADS, sliding_window=window)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    ids = ids_of(model, 120)
    base = logits(model, ids, DynamicCache(config=config), 7)
    past = KVCache(scheme, config)
    assert {type(layer) for layer in past.layers} == {QuantizedSlidingLayer}
    found = logits(model, ids, past, 7)
    assert spread(found, base) < {"int8": 0.03, "fp8": 0.1, "int4": 0.5, "kivi-int4": 0.5}.get(scheme, 1.5)
    if window == 40 and "kivi" in scheme:
        assert spread(found[:, :32], base[:, :32]) < 1e-4
    assert past.get_seq_length() == 120
    kept = [layer.held_keys.tokens for layer in past.layers]
    assert kept == [window - 1] * len(kept)
    assert past.nbytes < KVCacheBytes(past, 120)


def KVCacheBytes(past: KVCache, tokens: int) -> int:
    heads = 2 * len(past.layers) * 2  # batch, layers, heads
    return heads * past.scheme.count_bytes(tokens, 32, 32, torch.float32)


@pytest.mark.parametrize("scheme", ["int8", "kivi-int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss"])
def test_generate_as_with_a_plain_cache(name: str, scheme: str):
    """Greedy, beams, several answers; int8 hardly changes a logit, so that random models say the same."""
    model = build(name)
    ids = ids_of(model, 12)
    for settings in (
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2},
    ):
        options: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0, **settings}
        plain = model.generate(ids, **past_of(model, DynamicCache(config=model.config)), **options)
        ours = model.generate(ids, **past_of(model, KVCache(scheme, model.config)), **options)
        assert ours.shape == plain.shape
        assert float((ours == plain).float().mean()) > 0.8


def test_left_padding_changes_nothing():
    model = build("llama")
    ids = ids_of(model, 40, batch=1)
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, ids_of(model, 48, batch=1, seed=1)])
    mask = torch.ones_like(both)
    mask[0, :8] = 0
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **past_of(model, KVCache("int8", model.config)), **options)
    found = model.generate(both, attention_mask=mask, **past_of(model, KVCache("int8", model.config)), **options)
    assert torch.equal(found[0, 8:], alone[0])


def test_going_on_with_a_text():
    model = build("llama")
    ids = ids_of(model, 30)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    past = KVCache("int4", model.config)
    first = model.generate(ids, **past_of(model, past), max_new_tokens=10, **options)
    more = torch.cat([first, ids_of(model, 5, seed=2)], dim=1)
    second = model.generate(more, **past_of(model, past), max_new_tokens=10, **options)
    whole = model.generate(more, **past_of(model, KVCache("int4", model.config)), max_new_tokens=10, **options)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("scheme", ["int8", "kivi-int4"])
def test_crop_and_go_on_another_way(scheme: str):
    model = build("llama")
    ids, other = ids_of(model, 90), ids_of(model, 20, seed=3)
    past = KVCache(scheme, model.config)
    logits(model, ids, past, 30)
    past.crop(-50)
    assert past.get_seq_length() == 40
    found = logits(model, other, past, 20)
    base = logits(model, torch.cat([ids[:, :40], other], dim=1), DynamicCache(config=model.config), 60)[:, 40:]
    assert spread(found, base) < 0.1
    with pytest.raises(ValueError, match="negative"):
        past.crop(10)
    past.reset()
    assert (past.get_seq_length(), past.nbytes) == (0, 0)


def test_a_helper_model_guesses():
    """Assisted generation crops what was guessed wrong."""
    model, helper = build("llama"), build("llama", num_hidden_layers=1)
    ids = ids_of(model, 12, batch=1)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **past_of(model, KVCache("int8", model.config)), **options)
    found = model.generate(ids, assistant_model=helper, **past_of(model, KVCache("int8", model.config)), **options)
    assert torch.equal(found, plain)


def test_the_bytes_are_those_predicted():
    model = build("llama")
    for name, scheme in SCHEMES.items():
        past = KVCache(name, model.config)
        logits(model, ids_of(model, 200), past, 40)
        assert past.nbytes == KVCacheBytes(past, 200)
        assert scheme.name == name


def test_a_model_uses_it_by_itself(tmp_path: Path):
    folder = zoo.save("llama", tmp_path / "llama")
    model: Any = bitgrain.load(folder, device="cpu", kv_cache="kivi-int4")
    ids = ids_of(model, 70)
    past = getattr(model(input_ids=ids), past_argument(model))
    assert isinstance(past, KVCache)
    found = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert all(isinstance(layer, QuantizedLayer) for layer in getattr(found, past_argument(model)).layers)
    assert getattr(found, past_argument(model)).layers[0].held_keys.nbytes < 70 * 2 * 2 * 32 * 4
    assert getattr(model(input_ids=ids, use_cache=False), past_argument(model)) is None
    mine = DynamicCache(config=model.config)  # the caller's own is filled
    model(input_ids=ids, **past_of(model, mine))
    assert mine.get_seq_length() == 70
    plain: Any = bitgrain.load(folder, device="cpu")
    begun = getattr(plain(input_ids=ids), past_argument(model))  # one that has begun stays what it is
    model(input_ids=ids, **past_of(model, begun))
    assert type(begun.layers[0]) is DynamicLayer
    with pytest.raises(SchemeError, match="unknown KV cache scheme 'kivi-int5'; did you mean kivi-int"):
        bitgrain.load(folder, device="cpu", kv_cache="kivi-int5")


def test_training_keeps_no_past():
    model = build("llama")
    use_cache(model, lambda: KVCache("int8", model.config))
    model.train()
    assert not isinstance(getattr(model(input_ids=ids_of(model, 5)), past_argument(model)), KVCache)


def test_another_model():
    model = build("llama")
    with pytest.raises(ModelError, match="made for another model"):
        logits(model, ids_of(model, 5), KVCache("int8", build("llama", num_hidden_layers=1).config), 5)
    past = KVCache("int8", model.config)
    logits(model, ids_of(model, 5), past, 5)
    with pytest.raises(ModelError, match=r"belongs to another model or batch"):
        logits(model, ids_of(model, 5, batch=3), past, 5)
    with pytest.raises(ModelError, match="scales of 1 layers for a model of 2"):
        KVCache("fp8", model.config, [(torch.ones(1, 1), torch.ones(1, 1))])


def test_heads_that_groups_do_not_divide():
    model = build("llama", head_dim=24)
    with pytest.raises(SchemeError, match=r"groups of 32 channels, which do not divide 24; use int8, int4 or int2"):
        logits(model, ids_of(model, 5), KVCache("kivi-int4", model.config), 5)
    assert logits(model, ids_of(model, 5), KVCache("int4", model.config), 5).isfinite().all()


def test_layers_of_another_kind(monkeypatch: pytest.MonkeyPatch):
    class Odd(DynamicLayer):
        pass

    class OddCache:
        def __init__(self, config: Any) -> None:
            self.layers = [DynamicLayer(), Odd()]

    monkeypatch.setattr(cache, "DynamicCache", OddCache)
    with pytest.raises(SchemeError, match="layer 1 keeps its past in a Odd"):
        KVCache("int8", build("llama").config)


def test_schemes_that_cannot_be():
    spec = QuantSpec(IntFormat(8), per_tensor(), dynamic=True)
    with pytest.raises(SchemeError, match="would change the scale of tokens already held"):
        CacheScheme("mine", spec, spec)
    wide = QuantSpec(IntFormat(16), per_tensor())
    with pytest.raises(SchemeError, match="have no place in a cache"):
        CacheScheme("mine", wide, wide)


def test_static_scales_are_used():
    model = build("llama")
    ids = ids_of(model, 20)
    base = logits(model, ids, DynamicCache(config=model.config), 20)
    far = [(torch.full((1, 1), 1e3), torch.full((1, 1), 1e3))] * 2
    near = [(torch.full((1, 1), 1e-2), torch.full((1, 1), 1e-2))] * 2
    errors = [spread(logits(model, ids, KVCache("fp8", model.config, one), 20), base) for one in (far, near)]
    assert errors[0] > 3 * errors[1]
