"""Decoder layers found and proved, and run as few native calls: the same numbers as module by module."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from bitgrain.errors import NumericsError
from bitgrain.kernels.decoder import DecoderStack
from bitgrain.models.fused_blocks import fuse_blocks
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.fused_block import FusedForward, is_fused
from bitgrain.runtime.fused_model import unfuse
from bitgrain.runtime.kv_cache import KVCache, use_cache
from bitgrain.runtime.kv_cache.growing import GrowingCache
from bitgrain.runtime.kv_cache.layers import QuantizedLayer
from bitgrain.runtime.linear_rows import find_linear
from bitgrain.runtime.low_bit_linear import put_in_place
from bitgrain.runtime.quant_linear import QuantLinear
from hand_made import SPECS, hand_made
from packed_layers import pack_linears
from zoo import GROUPED, build, ids_for

CLOSE = 2e-2
"""Of the largest logit: a float32 sum in another order may round an input of the next product to the next code."""


def model_of(name: str, **changes: Any) -> Any:
    return pack_linears(build(name, **changes))


def growing(model: Any) -> Any:
    config = model.config
    use_cache(model, lambda: GrowingCache(config))
    return model


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = CLOSE) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, steps: int = 6, **kwargs: Any) -> torch.Tensor:
    """Of a text, then of more tokens one by one, then of three at once."""
    found = model(ids, use_cache=True, **kwargs)
    all_logits, cache = [found.logits], found.cache
    mask = kwargs.get("attention_mask")
    for tokens in [ids[:, i : i + 1] for i in range(steps)] + [ids[:, :3]]:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape)], 1)
        all_logits.append(model(tokens, cache=cache, use_cache=True, attention_mask=mask).logits)
    return torch.cat(all_logits, 1)


@pytest.fixture
def llama():
    model = growing(model_of("llama"))
    assert fuse_blocks(model) == ["model.layers.0", "model.layers.1"]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma"])
def test_fused_layers_give_what_their_modules_give(name: str, dtype: torch.dtype):
    model = growing(model_of(name)).to(dtype)
    ids = ids_for(model)
    before = logits(model, ids)
    assert len(fuse_blocks(model)) == 2
    calls = count_calls(model)
    after = logits(model, ids)
    assert calls == [0]  # no linear layer was called by itself
    assert same(after.float(), before.float(), CLOSE if dtype == torch.float32 else 3 * CLOSE)
    unfuse(model)
    assert logits(model, ids).equal(before)


@torch.inference_mode()
def test_a_model_made_under_inference_mode():
    model = growing(model_of("llama"))
    before = logits(model, ids_for(model))
    assert len(fuse_blocks(model)) == 2
    assert same(logits(model, ids_for(model)), before)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_caches_are_read_and_written_by_the_native_calls(name: str, scheme: str, monkeypatch: Any):
    model = model_of(name)
    config = model.config
    use_cache(model, lambda: KVCache(scheme, config))
    ids = ids_for(model)
    before = logits(model, ids)
    assert len(fuse_blocks(model)) == 2
    with monkeypatch.context() as patch:
        updates: list[int] = []
        update = QuantizedLayer.update

        def counted(self: Any, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            updates.append(key_states.shape[2])
            return update(self, key_states, *args, **kwargs)

        patch.setattr(QuantizedLayer, "update", counted)
        after = logits(model, ids)
    assert updates == [ids.shape[1]] * 2  # the text; what follows goes past Python
    # keys and values are packed before they are rounded to the model's dtype, or one code apart
    assert same(after, before, CLOSE if scheme == "int8" else 5 * CLOSE)


def test_a_packed_cache_refuses_what_it_cannot_hold():
    model = model_of("llama")
    config = model.config
    use_cache(model, lambda: KVCache("int8", config))
    assert fuse_blocks(model)
    with torch.no_grad():
        cache = model(ids_for(model), use_cache=True).cache
        held = cache.get_seq_length()
        model.model.layers[1].input_layernorm.weight.fill_(1e30)
        with pytest.raises(NumericsError, match="bfloat16 or float32"):
            model(torch.tensor([[1], [2]]), cache=cache, use_cache=True)
        assert cache.layers[1].held_keys.tokens == held


SCHEMES: dict[str, tuple[str, dict[str, str | None]]] = {
    "symmetric": ("W4A16", {}),
    "asymmetric": ("W4A16_ASYM", {}),
    "3 bits": ("W3A16", {}),
    "ternary": ("TERNARY", {}),
    "NF4": ("NF4", {}),
    "MXFP4": ("MXFP4A16", {}),
    "NVFP4": ("NVFP4A16", {}),
    "down in W8A8": ("W4A16", {"down_proj": "W8A8"}),
    "v in 8 bits": ("W4A16", {"v_proj": "W8A16"}),
    "a dense down": ("W4A16", {"down_proj": None}),
    "dense k and o": ("W4A8", {"k_proj": None, "o_proj": None}),
    "everything": ("NF4", {"q_proj": "W8A8", "v_proj": "W4A8", "o_proj": "W4A16", "up_proj": "INT8_TENSOR"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SCHEMES)
def test_weights_of_any_kind(kind: str, dtype: torch.dtype):
    scheme, others = SCHEMES[kind]
    model = growing(pack_linears(build("llama"), scheme, others)).to(dtype)
    ids = ids_for(model)
    before = logits(model, ids)
    assert len(fuse_blocks(model)) == 2
    calls = count_calls(model)
    after = logits(model, ids)
    assert calls == [0]
    assert same(after.float(), before.float(), CLOSE if dtype == torch.float32 else 3 * CLOSE)


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "Q6_K", "MLX 8"])
def test_weights_with_minima_and_nested_scales(name: str):
    model = growing(pack_linears(build("llama"), SPECS[name], {"v_proj": "W4A16", "down_proj": "W4A8"}))
    ids = ids_for(model)
    before = logits(model, ids)
    assert len(fuse_blocks(model)) == 2
    calls = count_calls(model)
    assert same(logits(model, ids), before)
    assert calls == [0]


@pytest.mark.parametrize(("path", "fused"), [("mlp.down_proj", [0, 1]), ("self_attn.o_proj", [1])])
def test_one_weight_with_an_order(path: str, fused: list[int]):
    model = growing(pack_linears(build("llama"), "W4A16"))
    ids, first = ids_for(model), model.model.layers[0]
    row, plain = find_linear(SPECS["act-order"], None, "cpu"), first.get_submodule(path)
    assert not isinstance(row, str)
    q = hand_made(SPECS["act-order"], plain.out_features, plain.in_features, size=0.02)
    put_in_place(first, path, QuantLinear(row.kernel(PackedMatrix.of(q), None)))
    before = logits(model, ids)
    assert fuse_blocks(model) == [f"model.layers.{i}" for i in fused]
    assert same(logits(model, ids), before)


def test_weights_with_an_order_keep_their_modules():
    model = growing(pack_linears(build("llama"), SPECS["act-order"]))
    ids = ids_for(model)
    before = logits(model, ids)
    assert fuse_blocks(model) == []
    assert logits(model, ids).equal(before)


def count_calls(model: Any) -> list[int]:
    """Calls of packed layers from now on, in a list of one."""
    calls = [0]
    for part in model.modules():
        if isinstance(part, QuantLinear):
            inner = part._call

            def counted(x: torch.Tensor, inner: Any = inner) -> torch.Tensor:
                calls[0] += 1
                return inner(x)

            part._call = counted
    return calls


OTHERS: dict[str, dict[str, Any]] = {
    "Qwen2": {},  # biases on q, k and v
    "Mistral": {"sliding_window": 12},
    "Gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "head_dim": 32, "sliding_window": 12},
    "Cohere": {},  # attention and MLP side by side, neighbours turn together
    "Olmo2": {},  # norms behind attention and MLP
    "GPTNeoX": {},
    "StableLm": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_the_zoo_does_not_have(name: str):
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**GROUPED, **OTHERS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = growing(pack_linears(model))
    ids = ids_for(model)
    before = logits(model, ids)
    fused = fuse_blocks(model)
    assert len(fused) == (2 if name in ("Qwen2", "Mistral", "StableLm") else 0)
    assert same(logits(model, ids), before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_stay_with_their_modules(name: str):
    model = growing(model_of(name))
    ids = ids_for(model)
    before = logits(model, ids)
    assert len(fuse_blocks(model)) == 2
    assert same(logits(model, ids), before)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi", "gpt-oss"])
def test_other_structures_stay_as_they_are(name: str):
    model = model_of(name)
    ids = ids_for(model)
    before = model(ids).logits
    fuse_blocks(model)
    assert same(model(ids).logits, before)


def test_an_encoder_is_left_alone():
    assert fuse_blocks(model_of("bert")) == []


def test_left_padding(llama: Any):
    ids = ids_for(llama)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    fused = logits(llama, ids, attention_mask=mask)
    plain = copy.deepcopy(llama)
    unfuse(plain)
    expected = logits(plain, ids, attention_mask=mask)
    assert same(fused[:, 5:], expected[:, 5:])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate(llama: Any, settings: dict[str, Any]):
    plain = copy.deepcopy(llama)
    unfuse(plain)
    ids = ids_for(llama, length=9)
    found: list[torch.Tensor] = []
    for model in (llama, plain):
        torch.manual_seed(3)
        found.append(model.generate(ids, max_new_tokens=12, min_new_tokens=12, pad_token_id=0, **settings))
    assert found[0].equal(found[1])


def test_assisted_generation(llama: Any):
    plain = copy.deepcopy(llama)
    unfuse(plain)
    ids = ids_for(llama, length=9)[:1]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert llama.generate(ids, assistant_model=plain, **settings).equal(plain.generate(ids, **settings))


def test_any_cache_may_be_given(llama: Any):
    ids = ids_for(llama)
    plain = DynamicCache(config=llama.config)
    with torch.no_grad():
        expected = llama(ids).logits
        llama(ids[:, :7], cache=plain)
        assert type(plain.layers[0]).__name__ == "GrowingLayer"  # it was empty
        given = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in plain.layers])
        rest = llama(ids[:, 7:], cache=given).logits
    assert same(rest, expected[:, 7:])


def test_hidden_states_and_attentions_are_still_there(llama: Any):
    ids = ids_for(llama)
    with torch.no_grad():
        states = llama(ids, output_hidden_states=True).hidden_states
        assert len(states) == 3
        assert not states[1].equal(states[2])
    eager = copy.deepcopy(llama)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(ids, output_attentions=True).attentions
        again = eager(ids).logits
    assert [one.shape for one in attentions] == [(2, 4, 24, 24)] * 2
    assert same(again, llama(ids).logits)
    calls = count_calls(llama)
    logits(llama, ids)  # what transformers leaves behind in the layers does not count
    assert calls == [0]


def test_layers_called_by_hand_give_their_own_results(llama: Any):
    plain = copy.deepcopy(llama)
    unfuse(plain)
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []
    for model in (llama, plain):
        model(ids_for(model))
        positions = model.model.rotary_emb(x, torch.arange(3)[None])
        cache = GrowingCache(model.config)
        with torch.no_grad():
            found.append(model.model.layers[0](x, position_embeddings=positions, cache=cache, use_cache=True))
        assert cache.get_seq_length(1) == 0
    assert same(*found)


def test_fewer_layers_than_there_are(llama: Any):
    plain = copy.deepcopy(llama)
    unfuse(plain)
    llama.config.num_hidden_layers = plain.config.num_hidden_layers = 1
    ids = ids_for(llama)
    assert same(logits(llama, ids), logits(plain, ids))


def test_all_layers_run_in_one_call(llama: Any, monkeypatch: pytest.MonkeyPatch):
    whole = DecoderStack.run_at
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*args)

    monkeypatch.setattr(DecoderStack, "run_at", counted)
    logits(llama, ids_for(llama), steps=6)
    assert calls == 6


def test_what_is_changed_afterwards_counts(llama: Any):
    model = copy.deepcopy(llama)
    assert all(is_fused(layer) for layer in model.model.layers)
    ids = ids_for(model)
    with torch.no_grad():
        logits(model, ids)
        model.model.layers[0].input_layernorm.weight.mul_(1.5)
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, y: 2 * y)
        found = logits(model, ids)
        unfuse(model)
        assert same(found, logits(model, ids))


def test_a_replaced_layer_runs(llama: Any):
    model = copy.deepcopy(llama)
    ids = ids_for(model)
    model(ids)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 256, bias=False)
    found = logits(model, ids)
    unfuse(model)
    assert same(found, logits(model, ids))


def test_layers_that_are_not_packed_stay_what_they_are():
    model = growing(pack_linears(build("llama"), "W4A16", {"layers.1.mlp.down_proj": None}))
    assert len(fuse_blocks(model)) == 2
    down, ids = model.model.layers[1].mlp.down_proj, ids_for(model)
    plain = copy.deepcopy(model)
    unfuse(plain)
    before = logits(model, ids)
    for one in (model, plain):  # trained, cast or replaced
        with torch.no_grad():
            one.model.layers[1].mlp.down_proj.weight.mul_(3)
    after = logits(model, ids)
    assert not same(after, before)
    assert same(after, logits(plain, ids))
    model(ids)
    down.weight = torch.nn.Parameter(down.weight / 3)
    assert same(logits(model, ids), before)
    assert model(ids).logits.requires_grad
    down.weight.requires_grad_(False)
    assert not model(ids).logits.requires_grad


def test_a_model_without_packed_layers_is_left_alone():
    assert fuse_blocks(build("llama").to(torch.bfloat16)) == []


def test_survives_pickling_and_casts(llama: Any):
    ids = ids_for(llama)
    fresh = model_of("llama")
    fuse_blocks(fresh)
    again = pickle.loads(pickle.dumps(fresh.model.layers[0]))
    assert isinstance(again.forward, FusedForward)
    assert again.forward.owner is again
    model = copy.deepcopy(llama).to(torch.bfloat16)
    assert same(logits(model, ids).float(), logits(llama, ids), 0.1)


def test_the_model_is_freed(llama: Any):
    model = copy.deepcopy(llama)
    model(ids_for(model))
    layer = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()
