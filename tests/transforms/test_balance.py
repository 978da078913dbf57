"""The expected rounding error is what rounding does, and descent lowers it below SmoothQuant's formula."""

from __future__ import annotations

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, fake_quantize, per_channel, per_group, per_tensor, per_token
from bitgrain.transforms import Balance, Pair
from bitgrain.transforms.balance import Sample, expected_error, weighted
from bitgrain.transforms.smoothquant import smoothing
from block_views import Blocks, build

INPUT = QuantSpec(IntFormat(8), per_token(), restricted=True, dynamic=True)
SPECS = [
    (QuantSpec(IntFormat(8), per_channel(), restricted=True), INPUT),
    (QuantSpec(IntFormat(6), per_group(16), restricted=True), INPUT),
    (QuantSpec(IntFormat(6), per_group(16), zero_point="integer"), None),
    (QuantSpec(IntFormat(8), per_tensor(), restricted=True), QuantSpec(IntFormat(8), per_tensor(), dynamic=True)),
]


def sample_and_weight() -> tuple[Sample, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(400, 64) * torch.exp(torch.randn(64))
    return Sample(x, torch.full((400,), 1 / 400)), torch.randn(96, 64) * torch.exp(0.5 * torch.randn(64))


@pytest.mark.parametrize(("weight_spec", "input_spec"), SPECS)
def test_expected_is_measured(weight_spec: QuantSpec, input_spec: QuantSpec | None):
    sample, weight = sample_and_weight()
    scale = torch.rand(64) + 0.5
    rounded = fake_quantize(weight * scale, weight_spec)
    x = sample.x / scale
    given = x if input_spec is None else fake_quantize(x, input_spec)
    measured = float((given @ rounded.T - sample.x @ weight.T).square().sum(1).mean())
    expected = float(expected_error(sample, [(weight, weight_spec, input_spec)], scale)) / 12
    assert measured == pytest.approx(expected, rel=0.15)


def test_a_static_limit_clips():
    sample, weight = sample_and_weight()
    static = QuantSpec(IntFormat(8), per_tensor(), restricted=True)
    layers, ones = [(weight, SPECS[0][0], static)], torch.ones(64)
    top = float(sample.x.abs().max())
    rounded = fake_quantize(weight, SPECS[0][0])
    for limit in (top, 0.6 * top, 0.3 * top):
        step = limit / 127
        given = (sample.x / step).round().clamp(-127, 127) * step
        measured = float((given @ rounded.T - sample.x @ weight.T).square().sum(1).mean())
        expected = float(expected_error(sample, layers, ones, torch.tensor(limit))) / 12
        assert measured == pytest.approx(expected, rel=0.25)  # what is clipped of two channels may add up
    assert float(expected_error(sample, layers, ones, torch.tensor(top))) == pytest.approx(
        float(expected_error(sample, layers, ones))
    )


def test_scales_for_static_inputs_leave_less_error_than_a_formula():
    sample, weight = sample_and_weight()
    sample.x[::50] *= 4  # tokens that are seldom: what they need is not what the others need
    static = QuantSpec(IntFormat(8), per_tensor(), restricted=True)
    pair = Pair("linear", "up.weight", ("down.weight",), 64)
    factors, _ = Balance(batch=400).descend(pair, sample, [(weight, SPECS[0][0], static)])

    def least(scale: torch.Tensor) -> float:
        x, w = sample.x / scale, fake_quantize(weight * scale, SPECS[0][0])
        found: list[float] = []
        for part in (1.0, 0.8, 0.6, 0.4, 0.3, 0.2):
            step = part * float(x.abs().max()) / 127
            given = (x / step).round().clamp(-127, 127) * step
            found.append(float((given @ w.T - sample.x @ weight.T).square().sum()))
        return min(found)

    formula = smoothing(sample.x.abs().amax(0), weight.abs().amax(0), 0.5)
    assert least(factors) < 0.8 * min(least(formula), least(torch.ones(64)))


@pytest.mark.parametrize("repeats", [1, 2])
def test_descent_is_better_than_a_formula(repeats: int):
    sample, weight = sample_and_weight()
    sample.x[:, ::4] = sample.x[:, ::4] ** 3  # channels that are seldom large: their largest value says little
    pair = Pair("linear", "v.weight", ("o.weight",), 64 // repeats, repeats=repeats, head=16)
    layers = [(weight, *SPECS[0])]
    factors, gain = Balance(steps=100, batch=400).descend(pair, sample, layers)
    assert factors.shape == (64 // repeats,)
    assert bool((factors > 0).all())
    ones = torch.ones(64)
    alone = float(expected_error(sample, layers, ones))
    if repeats == 1:
        formula = smoothing(sample.x.abs().amax(0), weight.abs().amax(0), 0.5)
        assert gain * alone < 0.95 * float(expected_error(sample, layers, formula))
    assert gain < 0.9
    again, _ = Balance(steps=100, batch=400).descend(pair, sample, layers)
    assert torch.equal(factors, again)


def test_tokens_are_taken_evenly():
    view = Blocks(build("llama")).view()
    seen: list[torch.Tensor] = []
    handle = view.module.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 256)))
    for batch in range(view.samples):
        view.run(batch)
    handle.remove()
    name = "mlp.down_proj.weight"
    found = Balance(tokens=32)._inputs(view, [name])
    torch.testing.assert_close(found[name], torch.cat([one[::3] for one in seen]))
    both = Balance()._inputs(view, [name, "self_attn.o_proj.weight"])
    assert {key: len(x) for key, x in both.items()} == dict.fromkeys(both, sum(map(len, seen)))
    assert len(both) == 2


def test_mean_squares_are_enough_for_weights_alone():
    sample, weight = sample_and_weight()
    layers = [(weight, *SPECS[2])]
    few, scale = weighted(sample.x, layers), torch.rand(64) + 0.5
    many = weighted(sample.x, [(weight, *SPECS[0])])
    assert few.x.shape == (1, 64)
    torch.testing.assert_close(expected_error(few, layers, scale), expected_error(many, layers, scale))


def test_tokens_with_large_outputs_count_less():
    weight = torch.eye(2)
    sample = weighted(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]), [(weight, *SPECS[0])])
    assert sample.share.tolist() == pytest.approx([5 / 11, 1 / 11, 5 / 11])  # 1/2, 1/10, 1/2, normalized


def test_nothing_to_go_by():
    weight, pair = torch.randn(5, 4), Pair("linear", "up.weight", ("down.weight",), 4)
    sample = weighted(torch.zeros(8, 4), [(weight, *SPECS[0])])
    assert sample.share.tolist() == [1 / 8] * 8
    factors, gain = Balance(steps=2).descend(pair, sample, [(weight, *SPECS[0])])
    assert (factors.tolist(), gain) == ([1.0] * 4, 1.0)
    x = torch.randn(8, 4)
    x[:, 2] = 0.0  # a channel that calibration never saw
    factors, _ = Balance(steps=20).descend(pair, weighted(x, [(weight, *SPECS[0])]), [(weight, *SPECS[0])])
    assert factors[2] == 1.0
    assert bool((factors[[0, 1, 3]] != 1.0).all())


def test_block():
    view = Blocks(build("llama")).view()
    figures = Balance(steps=5, batch=32).apply(view)
    assert set(figures["expected_error"]) == {pair.writer for pair in view.pairs}
    assert all(0 < gain <= 1 for gain in figures["expected_error"].values())
    assert figures["difference"] < 1e-4


def test_stacks_and_floating_point_formats_are_left_alone():
    assert "mlp.experts.gate_up_proj" not in Balance(steps=1).apply(Blocks(build("mixtral")).view())["expected_error"]
    assert Balance(steps=1).apply(Blocks(build("llama"), "FP8_DYNAMIC").view())["expected_error"] == {}


def test_weights_alone_are_rescaled_only_where_much_is_gained():
    view = Blocks(build("llama"), "W4A16_ASYM").view()
    before = {name: parameter.clone() for name, parameter in view.module.named_parameters()}
    figures = Balance(steps=40).apply(view)
    assert all(0.5 < gain <= 1 for gain in figures["expected_error"].values())
    assert all(parameter.equal(before[name]) for name, parameter in view.module.named_parameters())
    norm = view.module.post_attention_layernorm.weight.data
    outlier = torch.ones_like(norm)
    outlier[::16] = 50.0
    norm *= outlier
    for name in ("gate_proj", "up_proj"):
        view.module.mlp.get_submodule(name).weight.data.div_(outlier)
    figures = Balance(steps=40).apply(view)
    assert figures["expected_error"]["post_attention_layernorm"] < 0.5
    assert float(norm[::16].mean() / norm[1::16].mean()) < 10
    eager = Balance(steps=40, worth=1.0).apply(Blocks(build("llama"), "W4A16_ASYM").view())
    assert min(eager["expected_error"].values()) < 1


def test_settings():
    with pytest.raises(SchemeError, match="balance: steps"):
        Balance(steps=0)
    with pytest.raises(SchemeError, match="balance: worth"):
        Balance(worth=0.0)
