import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_channel, per_tensor, quantize
from bitgrain.numerics.observers import (
    HALF,
    StaticInput,
    from_batches,
    keeps_histogram,
    limits,
    merge,
    shared_input,
    start,
    static_input,
    static_scale,
    update,
)
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


@pytest.mark.parametrize("chosen", OBSERVED, ids=str)
def test_merged_states_are_those_of_all_the_data(chosen):
    x = activations() * 3
    x[15_000:] *= 40  # the second half needs wider bins
    whole = observe(chosen, [x])
    first, second = observe(chosen, [x[:12_000]]), observe(chosen, x[12_000:].split(500))
    for both in (merge(first, second), merge(second, first), merge(merge(start(chosen), first), second)):
        assert (both.low, both.high, both.elements, both.exponent) == (
            whole.low, whole.high, whole.elements, whole.exponent
        )  # fmt: skip
        assert both.counts is None or torch.equal(both.counts, whole.counts)


def test_merge_refuses_what_has_an_order_or_differs():
    a = observe(MovingAverage(), [torch.ones(2)])
    with pytest.raises(SchemeError, match="cannot be merged"):
        merge(a, a)
    with pytest.raises(SchemeError, match="cannot be merged"):
        merge(start(MSE()), start(MinMax()))


@pytest.mark.parametrize("chosen", [*OBSERVED, MovingAverage(), MovingAverage(0.5)], ids=str)
def test_one_histogram_and_the_ends_of_batches_serve_every_range(chosen):
    batches = activations().split(3000)
    kept = observe(Percentile(), batches)
    ends = torch.tensor([[batch.min(), batch.max()] for batch in batches])
    state = from_batches(chosen, ends, 20_000, kept.counts, kept.exponent)
    expected = observe(chosen, batches)
    for spec in (SYMMETRIC, ASYMMETRIC):
        assert limits(state, spec) == limits(expected, spec)
    assert from_batches(chosen, ends[:0], 0).elements == 0
    if keeps_histogram(chosen):
        with pytest.raises(SchemeError, match="were taken without them"):
            from_batches(chosen, ends, 20_000)
    else:
        assert limits(from_batches(chosen, ends, 20_000), SYMMETRIC) == limits(expected, SYMMETRIC)


def test_static_input_is_the_observed_scale():
    state = observe(MinMax(), [activations()])
    found = static_input(state, SYMMETRIC, "q_proj")
    assert torch.equal(found.scale, static_scale(state, SYMMETRIC)[0])
    assert found.zero is None
    assert static_input(state, ASYMMETRIC).zero is not None
    with pytest.raises(SchemeError, match="q_proj: inputs int8 per_channel"):
        static_input(state, QuantSpec(get_format("int8"), per_channel()), "q_proj")
    with pytest.raises(SchemeError, match="have no static scale"):
        static_input(state, QuantSpec(get_format("int8"), per_tensor(), dynamic=True))
    nested = QuantSpec(get_format("int8"), per_tensor(), scale=SYMMETRIC)
    with pytest.raises(SchemeError, match="need plainly stored scales"):
        static_input(state, nested)


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(0, 50)), min_size=1, max_size=4))
def test_a_shared_input_reaches_as_far_as_each(ends):
    for spec in (SYMMETRIC, ASYMMETRIC):
        alone = [static_input(observe(MinMax(), [torch.tensor(pair)]), spec) for pair in ends]
        both = shared_input(alone, spec)
        largest = max(float(one.scale) for one in alone)
        if spec.symmetric:
            assert float(both.scale) == largest
        else:
            assert float(both.scale) >= largest * (1 - 1e-6)
            step = float(both.scale)
            for one in alone:
                low, high = (float(one.scale) * (end - int(one.zero)) for end in (spec.low, spec.high))
                assert step * (spec.low - int(both.zero)) <= low + 0.51 * step
                assert step * (spec.high - int(both.zero)) >= high - 0.51 * step
        assert shared_input(alone[:1], spec) is alone[0]
        assert shared_input([alone[0], StaticInput(alone[0].scale.clone(), alone[0].zero)], spec) is alone[0]
