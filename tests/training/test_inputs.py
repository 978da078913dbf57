"""Static inputs while training: observed as a moving average, then learned with LSQ's gradient, then frozen."""

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, get_format, per_tensor, per_token
from bitgrain.numerics.formats import BF16
from bitgrain.numerics.observers import from_batches, static_input
from bitgrain.numerics.ranges import MovingAverage
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.training.inputs import LearnedInput

SPECS = [
    QuantSpec(IntFormat(8), per_tensor(), restricted=True, scale=BF16),
    QuantSpec(IntFormat(8), per_tensor(), zero_point="integer"),
    QuantSpec(get_format("fp8_e4m3"), per_tensor()),
]


def batches(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 16, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
def test_it_observes_a_moving_average_and_then_stays(spec: QuantSpec):
    x = batches(7)
    quantizer = LearnedInput(spec, batches=5, learn=False)
    for batch in x:
        quantizer(batch)
    ends = torch.stack([x[:5].flatten(1).amin(1), x[:5].flatten(1).amax(1)], 1)
    expected = static_input(from_batches(MovingAverage(), ends, 5 * 64), spec)
    found = quantizer.freeze()
    assert found.scale.dtype == expected.scale.dtype
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero is None) == (expected.zero is None)
    assert found.zero is None or torch.equal(found.zero, expected.zero)  # type: ignore[arg-type]
    assert torch.equal(quantizer(x[0]), InputQuantizer(spec, static=found)(x[0]))


def test_the_scale_is_learned_after_that():
    spec, x = SPECS[0], batches(3)
    quantizer = LearnedInput(spec, batches=1)
    quantizer(x[0]).sum().backward() if quantizer(x[0]).requires_grad else None
    assert quantizer.scale.grad is None  # observed, not learned yet
    upstream = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    y = 2 * x[1]
    quantizer(y).backward(upstream)
    v = y / quantizer.freeze().scale.float()
    inside = v.abs() <= 128
    by_scale = torch.where(inside, torch.round(v) - v, v.clamp(-128, 127))
    expected = (upstream * by_scale).sum() / (16 * 127) ** 0.5
    assert quantizer.scale.grad is not None
    assert float(quantizer.scale.grad) == pytest.approx(float(expected), rel=1e-3)


def test_its_state_is_saved_with_the_module():
    first, second = LearnedInput(SPECS[1], batches=2), LearnedInput(SPECS[1], batches=2)
    first(batches(1))
    second.load_state_dict(first.state_dict())
    first(2 * batches(1))
    second(2 * batches(1))
    assert torch.equal(first.freeze().scale, second.freeze().scale)
    assert torch.equal(first.limits, second.limits)


def test_what_cannot_be_is_said():
    with pytest.raises(SchemeError, match="run a batch in training mode first"):
        LearnedInput(SPECS[0]).eval()(batches(1))
    with pytest.raises(SchemeError, match="nothing to learn"):
        LearnedInput(QuantSpec(IntFormat(8), per_token(), dynamic=True))
