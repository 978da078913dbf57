"""Sparse outliers: their storage, how they are chosen, and what a spec with them means."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, get_format, per_block, per_channel, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.leave_one_out import find_outliers, largest, leave_one_out
from bitgrain.numerics.outliers import Outliers, column_dtype
from bitgrain.numerics.ranges import Percentile, Weighted
from bitgrain.numerics.spec import int_weight
from random_specs import LAWS, same, specs


def weights(rows: int = 6, cols: int = 40, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    x[torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed + 1)) < 0.02] *= 10
    return x


def loss(x, q) -> float:
    return float((x - q.dequantize()).double().square().sum())


def test_storage_by_hand():
    kept = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    outliers = Outliers.of(kept, torch.tensor([1.5, -2.0, 0.1]))
    assert outliers.starts.tolist() == [0, 2, 2, 3]
    assert outliers.columns.tolist() == [1, 2, 0]
    assert outliers.values.dtype is torch.float16
    dense = outliers.add_to(torch.ones(3, 3))
    assert dense.tolist() == [[1.0, 2.5, -1.0], [1.0, 1.0, 1.0], [1 + outliers.values[2].item(), 1.0, 1.0]]
    assert outliers.rows(1, 3).starts.tolist() == [0, 0, 1]
    assert outliers.rows(1, 3).add_to(torch.zeros(2, 3))[1, 0] == outliers.values[2]
    assert (column_dtype(2**15), column_dtype(2**15 + 1)) == (torch.int16, torch.int32)
    with pytest.raises(NumericsError, match="up_proj: 1 outliers overflow float16"):
        Outliers.of(kept, torch.tensor([1.0, 7e4, 1.0]), "up_proj")


def slow_gain(x: list[float], w: list[float], j: int, bits: int) -> float:
    """What one tile saves without element j: asymmetric min-max with integer zero points, in plain Python."""

    def cost(values: list[float], counts: list[float]) -> float:
        low, high = min(0.0, *values), max(0.0, *values)
        top = 2**bits - 1
        scale = (high - low) / top or 1.0
        zero = min(max(round(-low / scale), 0), top)
        total = 0.0
        for a, count in zip(values, counts, strict=True):
            code = min(max(round(a / scale + zero), 0), top)
            total += count * (a - scale * (code - zero)) ** 2
        return total

    if x[j] in (min(x), max(x)):
        return cost(x, w) - cost(x[:j] + x[j + 1 :], w[:j] + w[j + 1 :])
    alone = [0.0] * len(x)
    alone[j] = w[j]
    return cost(x, alone)  # the limits stay


def test_leave_one_out_is_the_slow_one():
    x, importance = weights(3, 16), torch.rand(16, generator=torch.Generator().manual_seed(5)) + 0.1
    spec = QuantSpec(get_format("uint3"), per_group(8), zero_point="integer")
    gains = leave_one_out(x, torch.zeros_like(x, dtype=torch.bool), spec, importance.expand(3, 16))
    for i in range(3):
        for k in (0, 8):
            row, counts = x[i, k : k + 8].tolist(), importance[k : k + 8].tolist()
            for j in range(8):
                assert gains[i, k + j].item() == pytest.approx(slow_gain(row, counts, j, 3), rel=1e-3, abs=1e-5)


def test_the_largest_and_ties():
    x = torch.tensor([[3.0, 1.0, 3.0], [3.0, 0.0, 5.0]])
    assert largest(x, 0).sum() == 0
    assert largest(x, 3).tolist() == [[True, False, True], [False, False, True]]


def test_what_stretches_a_tile_is_found():
    x = torch.full((2, 16), 0.5)
    x[:, ::2] = -0.4
    x[0, 5] = 40.0
    x[1, 6], x[1, 9] = 30.0, 28.0  # neither alone would help
    spec = int_weight(4, 16)
    found = find_outliers(x, spec, None, 3)
    assert found.nonzero().tolist() == [[0, 5], [1, 6], [1, 9]]
    q = quantize(x, replace(spec, outliers=3 / 32))
    assert loss(x, q) < 2e-3 * loss(x, quantize(x, spec))
    assert q.outliers is not None
    assert torch.equal(q.dequantize()[found], x[found])


@LAWS
@given(specs(outliers=(0.02, 0.1, 0.3), ranges=("minmax", "percentile")), st.integers(0, 99))
def test_every_spec_can_have_them(spec, seed):
    x = weights(5, 21, seed)
    q = quantize(x, spec)
    assert q.outliers is not None
    count = spec.count_outliers((5, 21))
    assert count == round(spec.outliers * 105)
    assert q.outliers.values.shape == (count,)
    rows, columns = q.outliers.places
    exact = x[rows, columns]
    dense = replace(q, outliers=None).dequantize()[rows, columns]
    assert bool(((q.dequantize()[rows, columns] - exact).abs() <= 2**-10 * (exact - dense).abs() + 1e-6).all())
    assert same(quantize(x, spec), q)


@pytest.mark.parametrize("chosen", [None, Weighted(), Percentile(99.0)], ids=str)
def test_outliers_save_error(chosen):
    x = weights(16, 64)
    for granularity in (per_group(16), per_block(4, 32)) if chosen else (per_group(16), per_channel()):
        spec = QuantSpec(get_format("int4"), granularity, "integer", scale=FP16)
        spec = spec if chosen is None else replace(spec, range=chosen)
        assert loss(x, quantize(x, replace(spec, outliers=0.03))) < 0.75 * loss(x, quantize(x, spec))


def test_importance_decides_which():
    x = torch.tensor([[10.0, 1.0, 1.5, -1.0, 1.5, 9.0]])
    spec = replace(int_weight(2, 3), outliers=1 / 6)
    for importance, place in (([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 0), ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 5)):
        q = quantize(x, spec, importance=torch.tensor(importance))
        assert q.outliers is not None
        assert q.outliers.columns.tolist() == [place]


def test_given_scales_are_used():
    x = weights()
    spec = replace(int_weight(4, 8), outliers=0.05)
    plain = quantize(x, int_weight(4, 8))
    q = quantize(x, spec, scale=torch.full_like(plain.scale, 0.1))  # type: ignore[arg-type]
    assert bool((q.scale == 0.1).all())
    assert q.outliers is not None
    assert q.outliers.values.numel() == 12
    assert loss(x, q) < loss(x, quantize(x, int_weight(4, 8), scale=torch.full_like(plain.scale, 0.1)))  # type: ignore


def test_any_shape_and_rounded_once():
    x = weights(6, 40).view(2, 3, 40)
    spec = replace(int_weight(4, 8), outliers=0.05)
    q = quantize(x, spec)
    assert torch.equal(q.dequantize(), quantize(x.view(6, 40), spec).dequantize().view(2, 3, 40))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


def test_bits_names_and_errors():
    spec = replace(int_weight(4, 32, scale=FP16), outliers=0.01)
    plain = replace(spec, outliers=0.0)
    assert spec.count_bits((64, 128)) == plain.count_bits((64, 128)) + 82 * 32 + 65 * 32
    assert spec.count_bits((2, 40000)) == plain.count_bits((2, 40000)) + 800 * 48 + 3 * 32
    assert spec.describe() == "int4 per_group(32) 1 % outliers, scale float16"
    assert "outliers" not in repr(plain)
    assert "outliers=0.01" in repr(spec)
    assert repr(plain) == repr(int_weight(4, 32, scale=FP16))
    for share in (-0.1, 0.6):
        with pytest.raises(SchemeError, match="share of the elements"):
            replace(plain, outliers=share)
    with pytest.raises(SchemeError, match="run time"):
        replace(spec, dynamic=True)
    with pytest.raises(SchemeError, match="scales of scales"):
        replace(plain, scale=spec)
    with pytest.raises(SchemeError, match="no simulation"):
        fake_quantize(weights(), spec)
    with pytest.raises(NumericsError, match="holds 1 NaN"):
        quantize(torch.tensor([[math.nan, 1.0]]), replace(plain, outliers=0.5))
