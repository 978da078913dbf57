"""A plain cache that grows ahead: the same as transformers' own, token by token, cropped, reordered, in windows."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import zoo
from bitgrain.runtime.kv_cache import past_argument, use_cache
from bitgrain.runtime.kv_cache.growing import GrowingCache, GrowingLayer, GrowingSlidingLayer

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "crop", "beams", "repeat", "reset"]), st.integers(1, 40)),
    max_size=12,
)


def build(name: str, **changes: Any) -> Any:
    model = zoo.build(name, **changes).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("window", [None, 9, 50])
@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_is_the_same_as_transformers_own(window: int | None, steps: list[tuple[str, int]]):
    ours: Any = GrowingLayer() if window is None else GrowingSlidingLayer(window)
    plain: Any = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    generator, batch = torch.Generator().manual_seed(0), 2
    for what, count in steps:
        begun = plain.is_initialized and plain.get_seq_length() > 0
        if what == "add":
            x, y = torch.randn(2, batch, 3, count, 8, generator=generator)
            for one, other in zip(ours.update(x, y), plain.update(x, y), strict=True):
                assert torch.equal(one, other)
        elif what == "crop" and begun and (window is None or plain.cumulative_length < window):
            count = min(count, plain.get_seq_length())
            ours.crop(-count)
            plain.crop(-count)
        elif what == "beams" and begun:
            beams = torch.randint(0, batch, (batch,), generator=generator)
            ours.reorder_cache(beams)
            plain.reorder_cache(beams)
        elif what == "repeat" and begun and batch < 8:
            batch *= 2
            ours.batch_repeat_interleave(2)
            plain.batch_repeat_interleave(2)
        elif what == "reset":
            ours.reset()
            plain.reset()
            batch = 2
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3)


def test_memory_is_taken_seldom():
    layer, taken = GrowingLayer(), set[int]()
    for _ in range(1000):
        keys, _ = layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        taken.add(keys.untyped_storage().data_ptr())
    assert len(taken) < 12
    assert keys.untyped_storage().nbytes() <= 1.5 * keys.nbytes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss"])
def test_generates_the_same(name: str):
    model = build(name)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        options = {"max_new_tokens": 20, "pad_token_id": 0, **options}
        plain = model.generate(ids, **{past_argument(model): DynamicCache(config=model.config)}, **options)
        found = model.generate(ids, **{past_argument(model): GrowingCache(model.config)}, **options)
        assert torch.equal(found, plain)


def test_a_model_uses_it_by_itself():
    config = transformers.MistralConfig(**zoo.GROUPED, **zoo.HEADS, sliding_window=9)
    model: Any = transformers.MistralForCausalLM(config).eval()
    use_cache(model, lambda: GrowingCache(config))
    past = getattr(model(input_ids=torch.ones(1, 20, dtype=torch.long)), past_argument(model))
    assert {type(layer) for layer in past.layers} == {GrowingSlidingLayer}


def test_gradients_flow():
    layer = GrowingLayer()
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    layer.update(x, x)
    keys, _ = layer.update(x, x)
    keys.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_what_inference_mode_made_can_grow_outside():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    keys, _ = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert keys.sum() == 4


def test_a_copy_grows_by_itself():
    layer = GrowingLayer()
    layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.rooms[0].place != layer.rooms[0].place
        keys, _ = again.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        assert keys.sum() == 12
        assert again.get_seq_length() == 4
    assert layer.get_seq_length() == 3
