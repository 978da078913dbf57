"""End-to-end tuning of a small classifier: the KL divergence falls on text that was not tuned on, too."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from bitgrain.numerics import QTensor, QuantSpec, get_format, nvfp4, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.spec import int_weight
from bitgrain.tuning.end_to_end import EndToEndSettings, tune_end_to_end
from random_specs import same


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"first": random(40, 32, seed=0) / 6, "second": random(20, 40, seed=1) / 2}
GAIN = torch.ones(32)
MIXING = random(32, 32, seed=4)


def predictions(dense: Mapping[str, Tensor], gain: Tensor, x: Tensor) -> Tensor:
    return torch.log_softmax(torch.tanh((x * gain) @ dense["first"].T) @ dense["second"].T, -1)


def divergence(inputs: Tensor) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Tensor]:
    def loss(dense: Mapping[str, Tensor], extras: Mapping[str, Tensor], index: int) -> Tensor:
        base = predictions(WEIGHTS, GAIN, inputs[index])
        found = predictions(dense, extras.get("gain", GAIN), inputs[index])
        return (base.exp() * (base - found)).sum(-1).mean()

    return loss


TRAINING = divergence(random(12, 100, 32, seed=2) @ MIXING)
OTHER = divergence(random(4, 100, 32, seed=3) @ MIXING)


def rounded(bits: int) -> dict[str, QTensor]:
    spec = int_weight(bits, 8, asymmetric=True, scale=FP16)
    return {name: quantize(weight, spec) for name, weight in WEIGHTS.items()}


def elsewhere(qtensors: Mapping[str, QTensor], extras: Mapping[str, Tensor]) -> float:
    dense = {name: q.dequantize() for name, q in qtensors.items()}
    return sum(float(OTHER(dense, extras, i)) for i in range(4)) / 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_and_gains_lower_the_divergence_elsewhere_too(bits: int):
    start = rounded(bits)
    found = tune_end_to_end(start, {"gain": GAIN}, TRAINING, 12)
    assert found.best_loss < 0.95 * found.first_loss
    assert elsewhere(found.qtensors, found.extras) < elsewhere(start, {"gain": GAIN})
    assert all(torch.equal(q.codes, start[name].codes) for name, q in found.qtensors.items())
    assert not torch.equal(found.extras["gain"], GAIN)


def test_what_is_not_asked_for_stays():
    start = rounded(2)
    found = tune_end_to_end(start, {"gain": GAIN}, TRAINING, 12, EndToEndSettings(steps=12, extra_rate=0.0))
    assert torch.equal(found.extras["gain"], GAIN)
    found = tune_end_to_end(start, {"gain": GAIN}, TRAINING, 12, EndToEndSettings(steps=12, scale_rate=0.0))
    assert all(same(q, start[name]) for name, q in found.qtensors.items())
    assert found.best_loss < found.first_loss


def test_real_zero_points_and_codes_can_be_tuned():
    spec = QuantSpec(get_format("uint3"), per_group(8), zero_point="real", scale=FP16)
    start = {name: quantize(weight, spec) for name, weight in WEIGHTS.items()}
    without = tune_end_to_end(start, {}, TRAINING, 12)
    zeros = tune_end_to_end(start, {}, TRAINING, 12, EndToEndSettings(zero_rate=0.02))
    assert zeros.best_loss < without.best_loss
    assert any(not torch.equal(q.zero, start[n].zero) for n, q in zeros.qtensors.items())  # type: ignore[arg-type]
    codes = tune_end_to_end(start, {}, TRAINING, 12, EndToEndSettings(code_rate=0.02), weights=WEIGHTS)
    assert codes.best_loss < without.best_loss
    assert any(not torch.equal(q.codes, start[name].codes) for name, q in codes.qtensors.items())


def test_nested_scales_keep_their_start():
    start = {**rounded(3), "second": quantize(WEIGHTS["second"], nvfp4())}
    found = tune_end_to_end(start, {}, TRAINING, 12)
    assert same(found.qtensors["second"], start["second"])
    assert not same(found.qtensors["first"], start["first"])


def test_bfloat16_is_used_where_asked_for():
    seen: set[torch.dtype] = set()

    def loss(dense: Mapping[str, Tensor], extras: Mapping[str, Tensor], index: int) -> Tensor:
        seen.add((dense["first"] @ dense["first"].T).dtype)
        return TRAINING(dense, extras, index).float()

    tune_end_to_end(rounded(3), {}, loss, 12, EndToEndSettings(steps=2, autocast=True))
    assert seen == {torch.bfloat16}
