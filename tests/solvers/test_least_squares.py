"""Alternating least squares: exact for binary and ternary numbers, a fixed point for all others."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_channel, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import Weighted
from bitgrain.solvers import Moments, get_solver
from bitgrain.solvers.least_squares import LeastSquares, ternary_scale
from random_specs import LAWS, same, specs


def data(rows: int = 5, cols: int = 24, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(cols, generator=generator) ** 2 + 0.01
    return torch.randn(rows, cols, generator=generator), Moments(importance.diag(), 10)


def losses(x, q, moments) -> torch.Tensor:
    """Of each tile."""
    error = (x - q.dequantize()).double().square() * moments.importance
    return to_tiles(error, q.spec.granularity).sum(-1)


def best_ternary(x: list[float], w: list[float]) -> float:
    """Least weighted loss of s * (-1, 0 or 1): every set of the k largest, its own best s."""
    order = sorted(range(len(x)), key=lambda j: -abs(x[j]))
    least = math.inf
    for k in range(1, len(x) + 1):
        chosen = order[:k]
        s = sum(w[j] * abs(x[j]) for j in chosen) / sum(w[j] for j in chosen)
        loss = sum(w[j] * (abs(x[j]) - s) ** 2 if j in chosen else w[j] * x[j] ** 2 for j in range(len(x)))
        least = min(least, loss)
    return least


def test_ternary_is_the_best_of_all():
    x, moments = data(40, 24)
    q = LeastSquares().solve(x, QuantSpec(get_format("ternary"), per_group(12)), moments).q
    found = losses(x, q, moments)
    for i in range(40):
        for k in range(2):
            part = slice(12 * k, 12 * (k + 1))
            best = best_ternary(x[i, part].tolist(), moments.importance[part].tolist())
            assert found[i, k].item() == pytest.approx(best, rel=1e-5)


def test_ternary_by_hand():
    # 3, 2, 0.1: with two of them s = 2.5 and the loss 0.51; with one s = 3 and 4.01; with three s = 1.7 and 4.34
    x = torch.tensor([[3.0, -2.0, 0.1], [0.0, 0.0, 0.0]])
    assert ternary_scale(x, None).tolist() == [2.5, 0.0]
    q = LeastSquares().solve(x, QuantSpec(get_format("ternary"), per_channel())).q
    assert q.dequantize().tolist() == [[2.5, -2.5, 0.0], [0.0, 0.0, 0.0]]


def test_binary_is_the_weighted_mean_magnitude():
    x, moments = data()
    q = LeastSquares().solve(x, QuantSpec(get_format("binary"), per_channel()), moments).q
    expected = (x.abs() * moments.importance).sum(-1) / moments.importance.sum()
    assert torch.allclose(scale_values(q.scale)[:, 0], expected)
    plain = LeastSquares().solve(x, QuantSpec(get_format("binary"), per_channel())).q
    assert torch.allclose(scale_values(plain.scale)[:, 0], x.abs().mean(-1))


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "nf4", "fp4_e2m1"])
def test_it_ends_at_a_fixed_point(name):
    x, moments = data()
    q = LeastSquares(iterations=100).solve(x, QuantSpec(get_format(name), per_channel()), moments).q
    v = q.spec.format.decode(q.codes)
    best = (moments.importance * v * x).sum(-1) / (moments.importance * v * v).sum(-1)
    start = quantize(x, q.spec)
    moved = (scale_values(q.scale) != scale_values(start.scale))[:, 0]
    assert bool(moved.any())
    assert torch.allclose(scale_values(q.scale)[moved, 0], best[moved], rtol=1e-5)


@pytest.mark.parametrize("zero_point", ["none", "integer", "real"])
def test_each_step_lowers_the_loss(zero_point):
    x, moments = data(16, 32)
    spec = QuantSpec(get_format("int3"), per_group(16), zero_point)
    steps = [losses(x, quantize(x, spec), moments).sum()]
    steps += [losses(x, LeastSquares(n, (1.0,)).solve(x, spec, moments).q, moments).sum() for n in (1, 2, 4, 8)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(steps))
    assert steps[-1] < 0.93 * steps[0]


@LAWS
@given(specs(nested=False), st.integers(0, 99), st.booleans())
def test_no_tile_is_worse_than_its_start(spec, seed, weighted):
    x, moments = data(5, 21, seed)
    if not weighted:
        moments = Moments(torch.eye(21), 1)
    before = losses(x, quantize(x, spec, importance=moments.importance), moments)
    after = losses(x, LeastSquares().solve(x, spec, moments if weighted else None).q, moments)
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all())


@LAWS
@given(specs(outliers=(0.0, 0.1)), st.integers(0, 99))
def test_no_matrix_is_worse_than_its_start(spec, seed):
    x, moments = data(5, 21, seed)
    q = LeastSquares(iterations=5).solve(x, spec, moments).q
    assert q.spec == spec
    if not spec.outliers:
        before = losses(x, quantize(x, spec, importance=moments.importance), moments).sum()
        assert losses(x, q, moments).sum() <= before * (1 + 1e-5) + 1e-9


def test_pieces_of_the_work_change_nothing(monkeypatch):
    x, moments = data(7, 40)
    for name in ("int3", "ternary"):
        spec = QuantSpec(get_format(name), per_group(16), scale=FP16, range=Weighted())
        whole = LeastSquares().solve(x, spec, moments).q
        monkeypatch.setattr("bitgrain.numerics.ranges.search.PIECE", 50)
        assert same(LeastSquares().solve(x, spec, moments).q, whole)
        monkeypatch.undo()


def test_errors():
    with pytest.raises(NumericsError, match="up_proj holds 1 NaN"):
        LeastSquares().solve(
            torch.tensor([[math.nan, 1.0]]), QuantSpec(get_format("int4"), per_channel()), name="up_proj"
        )
    for settings in ({"iterations": 0}, {"starts": []}, {"starts": [0.0]}):
        with pytest.raises(SchemeError, match="least_squares: iterations >= 1"):
            get_solver({"name": "least_squares", **settings})
    assert get_solver({"name": "least_squares", "starts": [1.0, 0.5]}) == LeastSquares(20, (1.0, 0.5))
