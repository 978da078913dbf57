"""Sums of layer inputs: exact under any split, merged within the tolerance, finite or refused."""

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.calibration.statistics import PIECE, TOLERANCE, Accumulator, LayerStatistics, layer_key, merge
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_tensor
from bitgrain.numerics.observers import limits, start, update
from bitgrain.numerics.ranges import KL, MSE, MinMax, MovingAverage, Percentile

WIDTH = 24
SPEC = QuantSpec(get_format("int8"), per_tensor(), restricted=True)


def inputs(tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 50
    x[:, 7] = 0.0
    return x + 0.1 * x[:, :1]


def gathered(batches: list[torch.Tensor], **options: bool) -> LayerStatistics:
    return accumulated(batches, **options).finish()


def accumulated(batches: list[torch.Tensor], **options: bool) -> Accumulator:
    found = Accumulator(WIDTH, "q_proj", **options)
    for batch in batches:
        found.update(batch)
    return found


def same(a: LayerStatistics, b: LayerStatistics, but: tuple[str, ...] = ()) -> bool:
    for field in fields(LayerStatistics):
        x, y = getattr(a, field.name), getattr(b, field.name)
        equal = torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        if field.name not in but and not equal:
            return False
    return True


def test_the_sums_are_what_they_are_called():
    """Against loops over tokens in float64."""
    x = inputs(700)
    found = gathered([x[:300], x[300:]], histogram=True)
    assert found.tokens == 700
    assert found.in_features == WIDTH
    assert found.hessian is not None
    for i in range(0, WIDTH, 5):
        for j in range(0, WIDTH, 3):
            exact = math.fsum(float(row[i]) * float(row[j]) for row in x) / 700
            scale = math.sqrt(sum(float(v) ** 2 for v in x[:, i]) * sum(float(v) ** 2 for v in x[:, j])) / 700
            assert abs(float(found.hessian[i, j]) - exact) <= TOLERANCE * scale
        assert float(found.mean_abs[i]) == pytest.approx(math.fsum(abs(float(v)) for v in x[:, i]) / 700, rel=1e-6)
        assert float(found.absmax[i]) == max(abs(float(v)) for v in x[:, i])
    assert torch.equal(found.low, x.amin(0))
    assert torch.equal(found.high, x.amax(0))
    assert torch.equal(found.hessian, found.hessian.T)
    assert found.ends.tolist() == [[float(part.min()), float(part.max())] for part in (x[:300], x[300:])]
    assert found.counts is not None
    assert int(found.counts.sum()) == x.numel()
    assert found.moments.hessian is found.hessian
    assert found.moments.tokens == 700


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(0, 1500), max_size=8), st.integers(0, 5))
def test_any_split_of_the_tokens_gives_the_same_bits(cuts: list[int], seed: int):
    x = inputs(1500, seed)
    bounds = [0, *sorted(cuts), 1500]
    batches = [x[a:b] for a, b in pairwise(bounds)]
    assert same(gathered(batches, histogram=True), gathered([x], histogram=True), but=("ends",))


def test_windows_keep_their_ends_however_they_are_batched():
    x = inputs(1200).view(12, 100, WIDTH)
    one_by_one = gathered(list(x.split(1)), histogram=True)
    assert same(gathered([x], histogram=True), one_by_one)
    assert same(gathered(list(x.split(5)), histogram=True), one_by_one)
    assert one_by_one.ends.shape == (12, 2)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(1, 1499), min_size=1, max_size=5), st.integers(0, 5))
def test_merged_sums_agree_within_the_tolerance(cuts: list[int], seed: int):
    x = inputs(1500, seed)
    bounds = [0, *sorted(cuts), 1500]
    parts = [accumulated([x[a:b]], histogram=True) for a, b in pairwise(bounds)]
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    found, whole = total.finish(), gathered([x], histogram=True)
    assert same(found, whole, but=("hessian", "mean_abs", "ends"))
    assert found.hessian is not None
    assert whole.hessian is not None
    diagonal = whole.hessian.diagonal()
    assert bool(((found.hessian - whole.hessian).abs() <= TOLERANCE * (diagonal[:, None] * diagonal).sqrt()).all())
    assert torch.allclose(found.mean_abs, whole.mean_abs, rtol=1e-6)
    assert found.ends.shape[0] == sum(1 for a, b in pairwise(bounds) if a < b)


def test_the_callers_batch_may_be_overwritten():
    buffer = torch.empty(100, WIDTH)
    x = inputs(300)
    found = Accumulator(WIDTH, "q_proj")
    for part in x.split(100):
        found.update(buffer.copy_(part))
    buffer.zero_()
    assert same(found.finish(), gathered(list(x.split(100))))


@pytest.mark.parametrize("range", [MinMax(), MovingAverage(), Percentile(99.0), MSE(), KL(stride=64)], ids=str)
def test_one_pass_gives_every_range(range):
    batches = list(inputs().split(400))
    state = start(range)
    for batch in batches:
        state = update(state, batch)
    found = gathered(batches, histogram=True)
    assert limits(found.observed(range), SPEC) == limits(state, SPEC)


def test_without_histogram_or_hessian():
    found = gathered([inputs(10)], hessian=False)
    assert found.hessian is None
    assert found.counts is None
    assert limits(found.observed(MinMax()), SPEC) == limits(update(start(MinMax()), inputs(10)), SPEC)
    with pytest.raises(SchemeError, match="taken without them"):
        found.observed(MSE())
    with pytest.raises(ValueError, match="without a Hessian"):
        _ = found.moments


def test_an_expert_that_nothing_reached():
    found = gathered([inputs(0)], histogram=True)
    assert found.tokens == 0
    assert found.hessian is not None
    assert not found.hessian.any()
    assert found.absmax.tolist() == [0.0] * WIDTH
    assert found.ends.shape == (0, 2)
    with pytest.raises(SchemeError, match="has seen no elements"):
        limits(found.observed(MSE()), SPEC)
    x = inputs(600)
    for parts in ([x, x[:0]], [x[:0], x]):
        both = merge(*(accumulated([part], histogram=True) for part in parts)).finish()
        assert same(both, gathered([x], histogram=True))


@pytest.mark.parametrize(("value", "words"), [(math.nan, "1 NaN and 0 Inf"), (math.inf, "0 NaN and 1 Inf")])
def test_activations_that_are_not_finite_name_the_layer(value: float, words: str):
    x = inputs(5)
    x[2, 1] = value
    with pytest.raises(NumericsError, match=rf"the inputs of q_proj hold {words} among 120 elements"):
        accumulated([inputs(5), x])


def test_sixteen_bit_inputs_are_summed_in_float32():
    x = inputs(600).to(torch.bfloat16)
    found, wide = gathered([x]), gathered([x.float()])
    assert same(found, wide, but=("hessian",))  # kernels multiply pairs of bfloat16, and add in another order
    exact = x.double().T @ x.double() / 600
    root = exact.diagonal().sqrt()
    assert found.hessian is not None
    assert ((found.hessian - exact).abs() <= TOLERANCE * root * root.unsqueeze(1)).all()


def test_misuse():
    with pytest.raises(ValueError, match="q_proj have the shape"):
        accumulated([torch.zeros(3, WIDTH + 1)])
    with pytest.raises(ValueError, match="q_proj and q_proj cannot be merged"):
        merge(accumulated([]), accumulated([], histogram=True))


def test_keys():
    assert layer_key("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert layer_key("experts.down_proj", 3) == "experts.down_proj[3]"
    assert PIECE == 512  # changing it changes the last bits of every Hessian
