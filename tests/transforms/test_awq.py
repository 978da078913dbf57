"""The formula of the factors, and that the search lowers the output error of the module it looks at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import fake_quantize
from bitgrain.transforms import Awq
from bitgrain.transforms.awq import scaling
from bitgrain.transforms.channels import input_size, weight_absmax, weight_mean
from block_views import Blocks, build


def salient_llama():
    """Some channels of the norms are large: their weights matter most."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::16] *= 20
            layer.post_attention_layernorm.weight[::16] *= 20
    return model


def test_formula():
    x, w = torch.tensor([4.0, 1.0]), torch.tensor([0.25, 1.0])
    assert scaling(x, None, 0.5).tolist() == pytest.approx([2**0.5, 0.5**0.5])
    plain = x**0.5 / (w**0.5 + 1e-4)
    torch.testing.assert_close(scaling(x, w, 0.5), plain / (plain[0] * plain[1]).sqrt())
    assert scaling(x, w, 0.0)[0] > 1  # light columns are scaled up whatever their inputs are


def test_mean_of_weights_is_relative_to_each_group():
    view = Blocks(build("llama"), "W4A16").view()
    spec = view.specs["mlp.up_proj.weight"][0]
    view.specs = {name: (replace(spec, granularity=type(spec.granularity)(1, 32)), None) for name in view.specs}
    pair = next(pair for pair in view.pairs if pair.writer == "post_attention_layernorm")
    rows = [row for part in ("gate", "up") for row in view.module.get_parameter(f"mlp.{part}_proj.weight")]
    expected = torch.zeros(128)
    for row in rows:
        for group in range(4):
            part = row[group * 32 : group * 32 + 32].detach().abs()
            expected[group * 32 : group * 32 + 32] += part / (part.max() + 1e-6)
    torch.testing.assert_close(weight_mean(view, pair, list(pair.readers)), expected / len(rows))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_statistics_of_channels(name: str):
    """Columns that share a channel count together; experts with channels of their own do not."""
    view = Blocks(build(name)).view()
    by_writer = {pair.writer: pair for pair in view.pairs}
    attention = by_writer["self_attn.v_proj.weight"]
    (reader,) = attention.readers
    columns = view.mean_abs[reader].view(2, 2, 32)
    torch.testing.assert_close(input_size(view, attention, dict(view.mean_abs), "mean"), columns.mean(1).flatten())
    largest = view.module.get_parameter(reader).abs().amax(0).view(2, 2, 32).amax(1).flatten()
    torch.testing.assert_close(weight_absmax(view, attention, [reader]), largest)
    if name == "mixtral":
        norm, experts = by_writer["post_attention_layernorm"], by_writer["mlp.experts.gate_up_proj"]
        stack = view.module.get_parameter("mlp.experts.gate_up_proj")
        torch.testing.assert_close(weight_absmax(view, norm, ["mlp.experts.gate_up_proj"]), stack.abs().amax((0, 1)))
        assert weight_mean(view, norm, ["mlp.experts.gate_up_proj"]).shape == (128,)
        assert weight_mean(view, experts, list(experts.readers)).shape == (4, 256)
        assert input_size(view, norm, dict(view.absmax), "max").shape == (128,)


def test_search_lowers_the_error():
    view = Blocks(salient_llama(), "W4A16").view()
    before, gate = view.run(0), view.module.mlp.gate_proj.weight.clone()
    weights = {name: view.module.get_parameter(name).data.clone() for name in view.specs}

    def error() -> float:
        kept = {name: view.module.get_parameter(name).data.clone() for name in view.specs}
        for name, (spec, _) in view.specs.items():
            parameter = view.module.get_parameter(name).data
            parameter.copy_(fake_quantize(parameter, spec))
        found = float((view.run(0) - before).square().sum())
        for name, value in kept.items():
            view.module.get_parameter(name).data.copy_(value)
        return found

    alone = error()
    figures = Awq(grid=8).apply(view)
    assert error() < 0.8 * alone
    assert figures["difference"] < 1e-4
    assert figures["exponent"]["post_attention_layernorm"] is not None
    assert figures["error"]["post_attention_layernorm"] < 0.8
    assert set(figures["error"]) == {pair.writer for pair in view.pairs}
    assert not view.module.mlp.gate_proj.weight.equal(gate)
    assert set(weights) == set(view.specs)


def test_what_nothing_improves_is_left_alone():
    view = Blocks(build("llama"), "W8A16").view()
    view.specs = {name: (replace(spec, range=spec.range), None) for name, (spec, _) in view.specs.items()}
    before = {name: value.clone() for name, value in view.module.state_dict().items()}
    view.mean_abs = {name: torch.full_like(value, 1.0) for name, value in view.mean_abs.items()}
    figures = Awq(grid=1, duo="off").apply(view)  # all factors 1: no better than none
    assert set(figures["exponent"].values()) == {None}
    assert all(value.equal(before[name]) for name, value in view.module.state_dict().items())


def test_settings():
    with pytest.raises(SchemeError, match="at least 1"):
        Awq(grid=0)
    with pytest.raises(SchemeError, match="duo is on, off or both, not 'half'"):
        Awq(duo="half")
    with pytest.raises(SchemeError, match="awq: pairs"):
        Awq(pairs="some")
