"""Equation 4, where it is applied, and the search."""

from __future__ import annotations

import pytest
import torch

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.transforms import SmoothQuant, get_transform
from bitgrain.transforms.smoothquant import smoothing
from block_views import Blocks, build


def outlier_llama():
    """Six channels of the norms are large, and their columns small."""
    model = build("llama")
    for layer in model.model.layers:
        norms = ((layer.input_layernorm, layer.self_attn, "qkv"), (layer.post_attention_layernorm, layer.mlp, None))
        for norm, module, parts in norms:
            names = ["q_proj", "k_proj", "v_proj"] if parts else ["gate_proj", "up_proj"]
            with torch.no_grad():
                norm.weight[:6] *= 60
                for name in names:
                    getattr(module, name).weight[:, :6] /= 60
    return model


def test_equation_4():
    x, w = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 0.25, 1.0, 0.0])
    assert smoothing(x, w, 0.5).tolist() == [10.0, 2.0, 1.0, 1.0]
    assert smoothing(x, w, 1.0).tolist() == [100.0, 1.0, 1.0, 1.0]
    assert smoothing(x, w, 0.0).tolist() == pytest.approx([1.0, 4.0, 1.0, 1.0])


def test_weights_and_gains_are_scaled_by_it():
    view = Blocks(build("llama")).view()
    qkv = [view.module.get_parameter(f"self_attn.{part}_proj.weight") for part in "qkv"]
    largest = torch.stack([weight.abs().amax(0) for weight in qkv]).amax(0)
    expected = view.absmax["self_attn.q_proj.weight"].sqrt() / largest.sqrt()
    before = [weight.clone() for weight in qkv]
    gain = view.module.input_layernorm.weight.clone()
    untouched = view.module.mlp.down_proj.weight.clone()
    figures = SmoothQuant().apply(view)
    assert figures["alpha"] == {"input_layernorm": 0.5, "post_attention_layernorm": 0.5}
    for weight, old in zip(qkv, before):
        torch.testing.assert_close(weight.data, old * expected)
    torch.testing.assert_close(view.module.input_layernorm.weight.data, gain / expected)
    assert view.module.mlp.down_proj.weight.equal(untouched)


def test_grouped_heads_share_the_factors_of_their_v():
    view = Blocks(build("llama")).view()
    largest_x = view.absmax["self_attn.o_proj.weight"].view(2, 2, 32).amax(1).flatten()
    weight = view.module.self_attn.o_proj.weight
    largest_w = weight.abs().amax(0).view(2, 2, 32).amax(1).flatten()
    v = view.module.self_attn.v_proj.weight.clone()
    SmoothQuant(pairs="linear").apply(view)
    factors = (largest_x / largest_w).sqrt()
    torch.testing.assert_close(view.module.self_attn.v_proj.weight.data, v / factors[:, None])


def test_each_expert_has_factors_of_its_own():
    view = Blocks(build("mixtral")).view()
    name = "mlp.experts.down_proj"
    before = view.module.get_parameter(name).clone()
    absmax = view.absmax[name]
    assert absmax.shape == (4, 256)
    SmoothQuant(pairs="linear").apply(view)
    for expert in range(4):
        factors = smoothing(absmax[expert], before[expert].abs().amax(0), 0.5)
        torch.testing.assert_close(view.module.get_parameter(name)[expert].data, before[expert] * factors)


def test_only_pairs_with_quantized_readers():
    view = Blocks(build("llama")).view()
    view.specs = {name: specs for name, specs in view.specs.items() if "mlp" in name}
    assert set(SmoothQuant(pairs="all").apply(view)["alpha"]) == {"post_attention_layernorm", "mlp.up_proj.weight"}


def test_search_finds_what_outliers_need():
    """Without outliers in the inputs a low alpha would do; here it must move most of them."""
    view = Blocks(outlier_llama()).view()
    before = view.run(0)
    figures = SmoothQuant(search=True, samples=1).apply(view)
    assert all(0.3 <= alpha <= 0.9 for alpha in figures["alpha"].values())
    assert figures["difference"] < 1e-4
    torch.testing.assert_close(view.run(0), before, rtol=1e-3, atol=1e-3)


def test_stacks_of_experts_are_not_searched():
    view = Blocks(build("mixtral")).view()
    figures = SmoothQuant(alpha=0.65, search=True, samples=1, pairs="linear").apply(view)
    assert figures["alpha"]["mlp.experts.gate_up_proj"] == 0.65


def test_a_pair_that_does_not_hold_is_an_error():
    view = Blocks(build("llama")).view()
    pair = next(pair for pair in view.pairs if pair.writer == "input_layernorm")
    view.pairs = [type(pair)(**{**vars(pair), "readers": pair.readers[:2]})]  # v is missing
    with pytest.raises(NumericsError, match=r"model\.layers\.0: smoothing input_layernorm -> self_attn\.q_proj"):
        SmoothQuant().apply(view)


def test_settings():
    assert get_transform({"name": "SmoothQuant", "alpha": 1, "pairs": "linear"}) == SmoothQuant(1.0, pairs="linear")
    with pytest.raises(SchemeError, match="between 0 and 1"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(SchemeError, match="pairs is norm, linear or all, not 'v'"):
        SmoothQuant(pairs="v")
