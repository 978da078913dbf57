"""One new token past the model's own forward: the same bits, and never where somebody would notice."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from bitgrain.models.fused_blocks import fuse_blocks
from bitgrain.runtime.fused_model import FusedModel, unfuse
from bitgrain.runtime.kv_cache import KVCache, use_cache
from bitgrain.runtime.kv_cache.growing import GrowingCache
from packed_layers import pack_linears
from zoo import GROUPED, build, ids_for

STEPS = 70  # beyond the first memory of a cache, and the first span of positions


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a model's forward was a step."""
    seen: list[bool] = []
    step = FusedModel.step

    def noted(self: FusedModel, *args: Any) -> Any:
        found = step(self, *args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(FusedModel, "step", noted)
    return seen


def fused(model: Any, make: Callable[[Any], Any] = GrowingCache) -> Any:
    config = model.config
    use_cache(model, lambda: make(config))
    assert fuse_blocks(model)
    return model


@pytest.fixture
def llama() -> Any:
    return fused(pack_linears(build("llama")))


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, steps: int = 6, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """Logits of a text and of more tokens one by one."""
    found = model(ids, attention_mask=mask, use_cache=True)
    logits, cache = [found.logits], found.cache
    for step in range(steps):
        tokens = ids[:, step % ids.shape[1] :][:, :1]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape)], 1)
        found = model(tokens, attention_mask=mask, cache=cache, use_cache=True, **kwargs)
        logits.append(found[0] if isinstance(found, tuple) else found.logits)
    return torch.cat(logits, 1)


def by_itself(model: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The same by the model's own forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedModel, "step", lambda *_: None)
        return run(model, ids, *args, **kwargs)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: pack_linears(build("llama")),
    "llama in W4A16": lambda: pack_linears(build("llama"), "W4A16"),
    "qwen3": lambda: pack_linears(build("qwen3")),
    "Qwen2": lambda: other("Qwen2"),
    "Mistral": lambda: other("Mistral", sliding_window=None),
    "Gemma": lambda: other("Gemma", head_dim=32),  # embeddings are scaled
    "yarn": lambda: other("Llama", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
}


def other(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**GROUPED, **settings})
    return pack_linears(getattr(transformers, f"{name}ForCausalLM")(config).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_steps_give_the_same_bits(name: str, dtype: torch.dtype, served: list[bool]):
    model = fused(MODELS[name]().to(dtype))
    ids = ids_for(model)
    for given in (ids[:1], ids):
        served.clear()
        found = run(model, given, STEPS)
        assert served == [False] + [True] * STEPS
        assert found.equal(by_itself(model, given, STEPS))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_packed_caches(scheme: str, served: list[bool]):
    model = fused(pack_linears(build("llama")), lambda config: KVCache(scheme, config))
    ids = ids_for(model)
    found = run(model, ids, STEPS)
    assert served.count(True) == STEPS + 3  # three of them proved it
    assert found.equal(by_itself(model, ids, STEPS))


def test_positions_of_a_batch(llama: Any, served: list[bool]):
    ids = ids_for(llama)
    for positions in ([[30], [30]], [[30], [31]], [[40]]):
        served.clear()
        given = torch.tensor(positions)
        found = run(llama, ids, position_ids=given)
        assert served.count(True) == 6
        assert found.equal(by_itself(llama, ids, position_ids=given))


def test_a_mask_that_hides_nothing_is_none(llama: Any, served: list[bool]):
    ids = ids_for(llama)
    mask = torch.ones_like(ids)
    found = run(llama, ids, mask=mask)
    assert served.count(True) == 6
    assert found.equal(by_itself(llama, ids, mask=mask))
    served.clear()
    mask[0, :5] = 0
    found = run(llama, ids, mask=mask)
    assert not any(served)
    assert found.equal(by_itself(llama, ids, mask=mask))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mistral", {"sliding_window": 12}),
        ("Llama", {"attn_implementation": "eager"}),
    ],
)
def test_models_that_do_more(name: str, settings: dict[str, Any], served: list[bool]):
    model = fused(other(name, **settings))
    ids = ids_for(model)
    served.clear()
    found = run(model, ids)
    assert not any(served)
    assert found.equal(by_itself(model, ids))


def test_positions_that_depend_on_the_past_are_asked_for_one_by_one(served: list[bool]):
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = fused(other("Llama", rope_parameters=parameters, max_position_embeddings=40))
    ids = ids_for(model)
    found = run(model, ids, STEPS)
    assert found.equal(by_itself(model, ids, STEPS))


def hook(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(lambda _, __, y: y).remove


def own_forward(module: Any) -> Callable[[], None]:
    inner = module.forward
    had = "forward" in module.__dict__
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)

    def undo() -> None:
        module.forward = inner
        if not had:
            del module.forward

    return undo


def class_forward(module: Any) -> Callable[[], None]:
    kind, inner = type(module), type(module).forward
    kind.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return lambda: setattr(kind, "forward", inner)


def global_hook(_: Any) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda _, __, y: y).remove


def adapter(layer: Any) -> Callable[[], None]:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

    down = layer.mlp.down_proj
    layer.mlp.down_proj = Adapted(down)
    return lambda: setattr(layer.mlp, "down_proj", down)


def written_over(layer: Any) -> Callable[[], None]:
    down = layer.mlp.down_proj
    layer.mlp._modules["down_proj"] = nn.Sequential(down)
    return lambda: layer.mlp._modules.update(down_proj=down)


def setting(name: str, value: Any) -> Callable[[Any], Callable[[], None]]:
    def change(model: Any) -> Callable[[], None]:
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        return lambda: setattr(model.config, name, before)

    return change


CHANGES: dict[str, tuple[str, Callable[[Any], Callable[[], None]]]] = {
    **{f"a hook on {path}": (path, hook) for path in (
        "model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers", "model.layers.1",
        "model.layers.1.self_attn", "model.layers.0.mlp.up_proj",
    )},
    **{f"a forward of {path}": (path, own_forward) for path in (
        "model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.1", "model.layers.1.mlp",
        "model.layers.0.self_attn.q_proj",
    )},
    **{f"a forward of the class of {path}": (path, class_forward) for path in (
        "model", "model.embed_tokens", "model.norm", "model.layers.0.mlp",
    )},
    "a hook on all modules": ("model", global_hook),
    "an adapter": ("model.layers.1", adapter),
    "a module written over": ("model.layers.1", written_over),
    "another attention": ("model", setting("_attn_implementation", "eager")),
    "hidden states": ("model", setting("output_hidden_states", True)),
    "fewer layers": ("model", setting("num_hidden_layers", 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_somebody_looks_at_or_changes_runs_by_itself(llama: Any, what: str, served: list[bool]):
    ids = ids_for(llama)
    before = run(llama, ids)
    path, change = CHANGES[what]
    undo = change(llama.get_submodule(path))
    try:
        served.clear()
        found = run(llama, ids)
        assert not any(served)
        assert found.equal(by_itself(llama, ids))
    finally:
        undo()
    served.clear()
    assert run(llama, ids).equal(before)
    assert served == [False] + [True] * 6


def test_arguments_that_ask_for_more(llama: Any, served: list[bool]):
    ids, base = ids_for(llama), llama.model
    for more in ({"output_hidden_states": True}, {"return_dict": False}):
        assert run(llama, ids, **more).equal(by_itself(llama, ids, **more))
    with torch.no_grad():
        cache = base(input_ids=ids, use_cache=True, cache=GrowingCache(base.config)).cache
        served.clear()
        assert isinstance(base(input_ids=ids[:, :1], cache=cache, use_cache=True, return_dict=False), tuple)
        states = base(input_ids=ids[:, :1], cache=cache, use_cache=True, output_hidden_states=True).hidden_states
        assert len(states) == 3
        embedded = base.embed_tokens(ids[:, :1])
        base(inputs_embeds=embedded, cache=cache, use_cache=True)
        with torch.enable_grad():
            base(input_ids=ids[:, :1], cache=cache, use_cache=True)
        base.train()
        base(input_ids=ids[:, :1], cache=cache, use_cache=True)
        assert served == [False] * 4  # not asked where there are gradients
        base.eval()
        base(input_ids=ids[:, :1], cache=cache, use_cache=True)
        assert served[-1]


@torch.no_grad()
def test_numbers_that_change_count(llama: Any, served: list[bool]):
    ids, found = ids_for(llama), [run(llama, ids_for(llama))]
    for change in (
        lambda: llama.model.embed_tokens.weight.mul_(2),
        lambda: llama.model.norm.weight.mul_(0.5),
        lambda: setattr(llama.model.norm, "weight", nn.Parameter(llama.model.norm.weight + 1)),
        lambda: setattr(llama.model.norm, "variance_epsilon", 0.1),
        lambda: llama.model.rotary_emb.inv_freq.mul_(0.7),
        lambda: setattr(llama.model.rotary_emb, "attention_scaling", 1.5),
        lambda: llama.model.layers[1].input_layernorm.weight.mul_(1.5),
        lambda: setattr(llama.model.layers[0].mlp.down_proj, "kernel", llama.model.layers[1].mlp.down_proj.kernel),
    ):
        change()
        served.clear()
        found.append(run(llama, ids))
        assert served.count(True) == 6
        assert found[-1].equal(by_itself(llama, ids))
        assert not found[-1].equal(found[-2])


@torch.no_grad()
def test_an_embedding_of_another_dtype(llama: Any, served: list[bool]):
    ids = ids_for(llama)
    run(llama, ids)
    llama.model.embed_tokens.to(torch.bfloat16)
    served.clear()
    assert run(llama, ids).equal(by_itself(llama, ids))
    assert not any(served)
    llama.model.embed_tokens.float()
    assert run(llama, ids).equal(by_itself(llama, ids))


@torch.no_grad()
def test_caches_that_are_copied_cropped_and_taken_in_turns(llama: Any, served: list[bool]):
    ids = ids_for(llama)

    def text() -> list[torch.Tensor]:
        caches = [llama(ids[:1], use_cache=True).cache, llama(ids[1:, :9], use_cache=True).cache]
        found: list[torch.Tensor] = []

        def take(token: int, cache: Any) -> None:
            found.append(llama(torch.tensor([[token]]), cache=cache, use_cache=True).logits)

        for token in range(1, 5):
            for cache in caches:
                take(token, cache)
        caches += [copy.deepcopy(caches[0]), pickle.loads(pickle.dumps(caches[0]))]
        for number, cache in enumerate(caches):
            take(7 + number, cache)
            take(5, cache)
        caches[1].crop(-3)
        caches[2].layers[1].keys = caches[2].layers[1].keys.clone()
        for cache in caches:
            take(9, cache)
        assert [cache.get_seq_length() for cache in caches] == [31, 13, 31, 31]
        assert [cache.layers[1].keys.shape[2] for cache in caches] == [31, 13, 31, 31]
        found += [layer.values.clone() for cache in caches for layer in cache.layers]
        return found

    served.clear()
    found = text()
    assert served.count(True) == 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedModel, "step", lambda *_: None)
        assert all(a.equal(b) for a, b in zip(found, text(), strict=True))


def test_other_caches(llama: Any, served: list[bool]):
    ids = ids_for(llama)
    with torch.no_grad():
        past = llama(ids, use_cache=True).cache
        given = DynamicCache([(layer.keys, layer.values) for layer in past.layers])
        served.clear()
        found = llama(ids[:, :1], cache=given, use_cache=True).logits
        assert served == [False]
        assert torch.allclose(found, llama(ids[:, :1], cache=past, use_cache=True).logits, atol=1e-3)


def test_generate_takes_steps(llama: Any, served: list[bool]):
    ids = ids_for(llama, length=9)[:1]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for more in ({}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(1)
        served.clear()
        found = llama.generate(ids, **settings, **more)
        assert served.count(True) == 11
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusedModel, "step", lambda *_: None)
            torch.manual_seed(1)
            assert llama.generate(ids, **settings, **more).equal(found)


def test_copies_run_by_themselves_and_unfuse_leaves_nothing(llama: Any, served: list[bool]):
    ids = ids_for(llama)
    for again in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama.model))):
        base = getattr(again, "model", again)
        served.clear()
        with torch.no_grad():
            cache = base(ids, use_cache=True, cache=GrowingCache(base.config)).cache
            base(ids[:, :1], use_cache=True, cache=cache)
        assert not any(served)
    unfuse(llama)
    assert not any("forward" in part.__dict__ for part in llama.modules())


def test_a_model_that_its_own_hooks_know_is_freed(llama: Any):
    model = copy.deepcopy(llama)
    unfuse(model)
    fuse_blocks(model)
    run(model, ids_for(model))
    model.model.layers[0].mlp.register_forward_hook(partial(lambda *_: None, model))
    layer = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None
