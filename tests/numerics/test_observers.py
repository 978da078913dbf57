import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_tensor, quantize
from bitgrain.numerics.observers import HALF, limits, start, static_scale, update
from bitgrain.numerics.ranges import KL, MSE, MinMax, MovingAverage, Percentile, Range, Weighted

SYMMETRIC = QuantSpec(get_format("int8"), per_tensor())
ASYMMETRIC = QuantSpec(get_format("uint8"), per_tensor(), zero_point="integer")
OBSERVED = [MinMax(), Percentile(99.0), MSE(), KL(stride=64), Weighted()]


def activations(n=20_000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x[:5] *= 20
    return x + 0.3


def observe(chosen: Range, batches):
    state = start(chosen)
    for batch in batches:
        state = update(state, batch)
    return state


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("chosen", OBSERVED, ids=str)
def test_limits_do_not_depend_on_batches_or_their_order(chosen, spec):
    x = activations()
    whole = limits(observe(chosen, [x]), spec)
    for split in (1000, 777, 15_000):
        parts = list(x.view(-1).split(split))
        assert limits(observe(chosen, parts), spec) == whole
        assert limits(observe(chosen, parts[::-1]), spec) == whole


@given(st.integers(0, 1000), st.floats(-30, 30), st.integers(1, 50))
def test_histograms_of_any_split_are_equal(seed, exponent, split):
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[seed % 50] *= 1000
    one, many = observe(Percentile(), [x]), observe(Percentile(), x.split(split))
    assert one.exponent == many.exponent
    assert torch.equal(one.counts, many.counts)
    assert int(one.counts.sum()) == 50
    largest = float(x.abs().max())
    assert HALF / 2 * one.width <= largest <= HALF * one.width


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_percentile_is_the_exact_one_within_a_bin(spec):
    x, chosen = activations(), Percentile(99.5)
    state = observe(chosen, x.split(1000))
    expected = chosen.limits(x.view(1, 1, -1), spec)
    for got, exact in zip(limits(state, spec), expected, strict=True):
        assert abs(float(got) - float(exact)) <= 2 * state.width


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_mse_from_a_histogram_is_nearly_as_good_as_from_the_data(spec):
    x = activations()
    state = observe(MSE(), x.split(1000))

    def loss(scale, zero):
        return float((quantize(x.view(1, -1), spec, scale=scale, zero=zero).dequantize() - x).square().mean())

    from_data = quantize(x.view(1, -1), QuantSpec(spec.format, per_tensor(), spec.zero_point, range=MSE()))
    assert loss(*static_scale(state, spec)) <= 1.02 * loss(from_data.scale, from_data.zero)
    assert loss(*static_scale(state, spec)) <= loss(*static_scale(observe(MinMax(), [x]), spec))


def test_moving_average():
    state = observe(MovingAverage(0.9), [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0])])
    low, high = limits(state, SYMMETRIC)
    assert (low.item(), high.item()) == (pytest.approx(-1.2), pytest.approx(1.9))
    x = activations()
    assert limits(observe(MovingAverage(), [x]), SYMMETRIC) == limits(observe(MinMax(), [x]), SYMMETRIC)


def test_edges():
    with pytest.raises(SchemeError, match="has seen no elements"):
        limits(start(MinMax()), SYMMETRIC)
    with pytest.raises(NumericsError, match="k_proj holds 1 NaN"):
        update(start(KL()), torch.tensor([math.nan]), "k_proj")
    for chosen in OBSERVED:
        state = observe(chosen, [torch.zeros(3), torch.zeros(0)])
        assert state.elements == 3
        assert [v.item() for v in limits(state, SYMMETRIC)] == [0.0, 0.0]
        assert static_scale(state, SYMMETRIC)[0].item() == 1.0
        grown = update(state, torch.tensor([5.0, -1.0]))
        assert float(limits(grown, ASYMMETRIC)[1]) <= 5.1  # least squares may go a little beyond the data
