"""Rotations: outliers of channels disappear, the function stays, and what cannot be rotated says why."""

from __future__ import annotations

import pytest
import torch

import zoo
from bitgrain.errors import ModelError, SchemeError
from bitgrain.numerics.hadamard import Rotation
from bitgrain.transforms import Rotate
from bitgrain.transforms.proof import TOLERANCE, difference
from block_views import Blocks, build, measure


def test_hidden_states_are_rotated():
    blocks = Blocks(build("llama"))
    before = [run(0) for _, run in (blocks.runner(0), blocks.runner(1))]
    Rotate().apply_outside(blocks.outside())
    for index in range(2):
        figures = Rotate().apply(blocks.view(index))
        assert max(figures.values()) < TOLERANCE
        _, run = blocks.runner(index)
        assert difference(Rotation(128, 0)(before[index]), run(0)) < TOLERANCE
    assert bool((blocks.model.model.layers[0].input_layernorm.weight == 1).all())


def test_outliers_are_gone():
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] += 3.0
        for layer in model.model.layers:
            layer.input_layernorm.weight[9] = 50.0
            layer.post_attention_layernorm.weight[9] = 50.0
            layer.self_attn.v_proj.weight[7] *= 30.0
    blocks = Blocks(model)
    peaks = []
    for _ in range(2):
        block, run = blocks.runner(1)
        absmax, mean = measure(block, ["self_attn.q_proj.weight", "self_attn.o_proj.weight"], run)
        peaks.append([float(absmax[name].max() / mean[name].mean()) for name in absmax])
        if len(peaks) == 1:
            blocks.apply(["rotate"])
    assert peaks[0][0] > 3 * peaks[1][0]
    assert peaks[0][1] > 2 * peaks[1][1]


def test_layernorms_keep_their_mean():
    """A LayerNorm commutes with rotations that leave (1, .., 1) where it is."""
    blocks = Blocks(build("phi"))
    outside = blocks.outside()
    assert outside.stream.centred
    assert blocks.view().stream.centred
    before = blocks.runner(0)[1](0)
    blocks.apply([{"name": "rotate", "seed": 3}])
    assert difference(Rotation(128, 3, keep_mean=True)(before), blocks.runner(0)[1](0)) < TOLERANCE
    assert not Blocks(build("llama")).view().stream.centred


def test_sandwiched_norms_are_refused():
    model_class = "Gemma2ForCausalLM"
    zoo_entry = (model_class, {**zoo.GROUPED, **zoo.HEADS, "tie_word_embeddings": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.ZOO, "gemma2", zoo_entry)
        blocks = Blocks(build("gemma2"))
    with pytest.raises(ModelError, match=r"layers\.0 cannot be rotated: the output of the norm post_attention"):
        blocks.apply(["rotate"])


def test_only_the_heads():
    blocks = Blocks(build("llama"))
    before = {name: value.clone() for name, value in blocks.model.state_dict().items()}
    assert Rotate(r1=False).apply_outside(blocks.outside()) == {}
    Rotate(r1=False).apply(blocks.view())
    changed = {name for name, value in blocks.model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"model.layers.0.self_attn.{part}_proj.weight" for part in "vo"}


def test_blocks_need_a_known_stream():
    view = Blocks(build("llama")).view()
    view.stream = None
    with pytest.raises(ModelError, match=r"model\.layers\.0: its residual stream is unknown"):
        Rotate().apply(view)


def test_tied_embeddings_rotate_where_the_final_gain_is_one():
    model = build("llama-tied")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    before = zoo.outputs(model, zoo.ids_for(model))
    blocks = Blocks(model)
    blocks.apply(["rotate"])
    assert difference(before, zoo.outputs(model, zoo.ids_for(model))) < TOLERANCE
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "rotated"), [("llama", 2), ("gpt2", 2), ("phi", 2), ("mixtral", 0)])
def test_inputs_of_down_are_rotated_at_run_time(name: str, rotated: int):
    """Stacks of experts are no modules that could be told to: they are left alone."""
    model = build(name)
    before = zoo.outputs(model, zoo.ids_for(model))
    found = Blocks(model).apply([{"name": "rotate", "r1": False, "r2": False, "r4": True}])
    online = [path for figures in found.values() for path in figures.get("online", {})]
    assert len(online) == rotated
    assert all(getattr(part, "input_rotation", None) for layer in [model] for part in _owners(layer, online))
    assert difference(before, zoo.outputs(model, zoo.ids_for(model))) < TOLERANCE


def _owners(model: torch.nn.Module, online: list[str]) -> list[torch.nn.Module]:
    found = [part for name, part in model.named_modules() for path in set(online) if name.endswith("." + path)]
    assert len(found) == len(online)
    return found


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_learned_rotation_leaves_the_function(name: str):
    model = build(name)
    before = zoo.outputs(model, zoo.ids_for(model))
    figures = Blocks(model).apply([{"name": "rotate", "learn": 30}])
    outside = figures["outside:Rotate"]
    assert outside["peaks_after"] < outside["peaks_before"]
    assert difference(before, zoo.outputs(model, zoo.ids_for(model))) < TOLERANCE


@pytest.mark.parametrize("settings", [{"learn": -1}, {"learn": 10, "r1": False}])
def test_settings_that_cannot_be(settings: dict[str, object]):
    with pytest.raises(SchemeError, match="learn is a number of steps in which r1 is fitted"):
        Rotate(**settings)
