"""What the skeleton tells of keys and values is what a real model keeps."""

from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import zoo
from bitgrain.errors import ModelError
from bitgrain.models.past import Past, find_past
from bitgrain.models.skeleton import build_skeleton
from bitgrain.runtime.kv_cache import past_argument


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "phi3", "gpt2", "opt", "mixtral", "qwen3-moe", "gpt-oss"])
def test_shapes_are_those_of_the_real_cache(name: str):
    model: Any = zoo.build(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), **{past_argument(model): cache})
    past = find_past(build_skeleton(model.config))
    assert [(one.heads, one.key_size, one.value_size) for one in past] == [
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers
    ]


def test_windows_and_keys_that_are_wider_than_values():
    config = transformers.MistralConfig(**zoo.GROUPED, **zoo.HEADS, sliding_window=9)
    past = find_past(build_skeleton(config))
    assert {one.window for one in past} == {9}
    assert [past[0].tokens(n) for n in (3, 8, 9, 100)] == [3, 8, 8, 8]


def test_keys_and_values_of_different_sizes():
    """Multi-head latent attention keeps a compressed past."""
    config = transformers.DeepseekV3Config(
        **{**zoo.GROUPED, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model = transformers.DeepseekV3ForCausalLM(config)
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), **{past_argument(model): cache})
    first: Any = cache.layers[0]
    past = find_past(build_skeleton(config))[0]
    assert past.key_size != past.value_size
    assert past == Past(first.keys.shape[1], first.keys.shape[3], first.values.shape[3], None)


def test_a_model_that_cannot_be_run():
    skeleton = build_skeleton(zoo.build("llama").config)
    skeleton.model.layers[0].forward = lambda *_, **__: 1 + "x"  # type: ignore[operator]
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be run without weights"):
        find_past(skeleton)
