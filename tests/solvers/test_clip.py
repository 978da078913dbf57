"""Clipping for the outputs: the grid against a slow twin, the descent against its gradient, and the guard."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, get_format, per_block, per_channel, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.ranges import Weighted
from bitgrain.numerics.spec import int_weight
from bitgrain.solvers import Moments, get_solver
from bitgrain.solvers.clip import Clip, _Learned  # pyright: ignore[reportPrivateUsage]
from bitgrain.solvers.objective import layer_error, row_errors
from random_specs import LAWS, same, specs


def layer(rows: int = 6, cols: int = 32, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 0.1
    x[torch.rand(rows, cols, generator=generator) < 0.03] *= 5
    inputs = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return x, Moments(inputs.T @ inputs / (4 * cols), 4 * cols)


def best_of_the_grid(x: list[float], hessian: list[list[float]], bits: int) -> float:
    """Least dW H dW^T of one group under asymmetric integers, each factor of AWQ's grid in plain Python."""
    top, n, least = 2**bits - 1, len(x), float("inf")
    for i in range(11):  # the first is no clipping at all
        limit = max(map(abs, x)) * (1 - i / 20)
        low, high = min(0.0, max(min(x), -limit)), max(0.0, min(max(x), limit))
        scale = (high - low) / top
        zero = min(max(round(-low / scale), 0), top)
        change = [a - scale * (min(max(round(a / scale + zero), 0), top) - zero) for a in x]
        least = min(least, sum(change[j] * hessian[j][k] * change[k] for j in range(n) for k in range(n)))
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_is_the_slow_one(bits):
    x, moments = layer(5, 12, bits)
    spec = QuantSpec(get_format(f"uint{bits}"), per_channel(), "integer")
    q = Clip(mode="grid").solve(x, spec, moments).q
    expected = [best_of_the_grid(row.tolist(), moments.hessian.tolist(), bits) for row in x]
    assert row_errors(x, q, moments.hessian).tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("zero_point", ["none", "real"])
def test_the_gradient_is_that_of_fake_quantize(zero_point):
    x, moments = layer()
    spec = QuantSpec(get_format("int3"), per_group(8), zero_point)
    learned = _Learned(x, spec, moments.hessian, spec.range.scale(x.view(6, 4, 8), spec), 0.1, 1)
    grads = []
    for ours in (True, False):
        scale, zero = (
            None if t is None else (0.7 * t).requires_grad_() for t in spec.range.scale(x.view(6, 4, 8), spec)
        )
        assert scale is not None
        dense = learned._dense((scale, zero))[0] if ours else fake_quantize(x, spec, scale=scale, zero=zero)
        dense.backward((dense - x).detach() @ moments.hessian)
        grads.append((scale.grad, None if zero is None else zero.grad))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-4)
    assert grads[0][1] is grads[1][1] is None or torch.allclose(grads[0][1], grads[1][1], rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_point", ["none", "integer", "real"])
def test_both_modes_gain(bits, zero_point):
    x, moments = layer(24, 64)
    spec = QuantSpec(get_format(f"int{bits}"), per_group(32), zero_point, scale=FP16)
    rtn = layer_error(x, quantize(x, spec), moments.hessian)
    grid = layer_error(x, Clip(mode="grid").solve(x, spec, moments).q, moments.hessian)
    learned = layer_error(x, Clip(steps=60).solve(x, spec, moments).q, moments.hessian)
    assert learned < grid < 0.95 * rtn


@settings(LAWS, max_examples=40)
@given(specs(nested=False), st.integers(0, 99), st.sampled_from(["grid", "learned"]))
def test_no_row_of_tiles_is_worse_than_its_start(spec, seed, mode):
    x, moments = layer(5, 21, seed)
    q = Clip(mode=mode, steps=4, grid=4).solve(x, spec, moments).q
    start = quantize(x, spec, importance=moments.importance)
    rows = spec.granularity.tile((5, 21))[0]
    for part, before, after in zip(
        range(0, 5, rows),
        row_errors(x, start, moments.hessian).split(rows),
        row_errors(x, q, moments.hessian).split(rows),
        strict=True,
    ):
        assert after.sum() <= before.sum() * (1 + 1e-5) + 1e-9, part


@settings(LAWS, max_examples=40)
@given(specs(outliers=(0.0, 0.1)), st.integers(0, 99), st.sampled_from(["grid", "learned"]))
def test_no_matrix_is_worse_than_its_start(spec, seed, mode):
    x, moments = layer(5, 21, seed)
    solver = Clip(mode=mode, steps=3, grid=4)
    q = solver.solve(x, spec, moments).q
    assert q.spec == spec
    assert same(q, solver.solve(x, spec, moments).q)
    if not spec.outliers:
        before = layer_error(x, quantize(x, spec, importance=moments.importance), moments.hessian)
        assert layer_error(x, q, moments.hessian) <= before * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_off_and_leaves_none(mode):
    x, moments = layer()
    with mode():
        q = Clip(steps=2).solve(x.clone(), int_weight(3, 8), Moments(moments.hessian.clone(), 1)).q
    assert not q.dequantize().requires_grad
    assert same(q, Clip(steps=2).solve(x, int_weight(3, 8), moments).q)


@pytest.mark.parametrize("granularity", [per_group(8), per_block(2, 16)], ids=str)
def test_a_negative_scale_and_blocks(granularity):
    x, moments = layer(8, 32)
    x = x.abs() * 1.5 - 0.02  # the positive end is the larger one
    spec = QuantSpec(get_format("int3"), granularity, range=Weighted())
    start = quantize(x, spec, importance=moments.importance)
    assert bool((start.scale < 0).any())  # type: ignore[operator]
    q = Clip(steps=10).solve(x, spec, moments).q
    assert layer_error(x, q, moments.hessian) <= layer_error(x, start, moments.hessian)


def test_errors_and_no_tokens():
    x, moments = layer()
    spec = int_weight(4, 8)
    with pytest.raises(SchemeError, match="up_proj: clip needs the second moments"):
        Clip().solve(x, spec, name="up_proj")
    with pytest.raises(NumericsError, match="up_proj holds 1 NaN"):
        Clip().solve(x.where(x != x[0, 0], torch.nan), spec, moments, name="up_proj")
    with pytest.raises(SchemeError, match="belong to another layer"):
        Clip().solve(x[:, :16], spec, moments)
    with pytest.raises(SchemeError, match="mode is learned or grid, not 'best'"):
        get_solver({"name": "clip", "mode": "best"})
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"grid": 0}, {"smallest": 0.0}):
        with pytest.raises(SchemeError, match="clip: steps"):
            get_solver({"name": "clip", **wrong})
    found = Clip().solve(x, spec, replace(moments, tokens=0))
    assert (found.method, found.notes) == ("rtn", ("calibration sent it no tokens: rounded to nearest",))
    zeros = Clip(steps=3).solve(torch.zeros(4, 32), spec, moments).q
    assert not bool(zeros.dequantize().any())
