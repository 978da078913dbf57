"""Coordinate descent: against the same written out, and never upwards."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError
from bitgrain.numerics import (
    Granularity,
    IntFormat,
    QTensor,
    QuantSpec,
    get_format,
    per_channel,
    per_group,
    quantize,
)
from bitgrain.numerics.formats import FP16, FP32
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import get_range
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS
from bitgrain.solvers import refine as module
from bitgrain.solvers.objective import layer_error, row_errors
from bitgrain.solvers.refine import refine
from random_specs import LAWS, same, specs


def layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.1
    mix = torch.eye(cols) + 2 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=generator) @ mix
    h = x.t() @ x / x.shape[0]
    return weight, h + 0.01 * h.diagonal().mean() * torch.eye(cols)


@pytest.mark.parametrize(
    "spec",
    [int_weight(4, 8, asymmetric=True), QuantSpec(get_format("nf4"), per_channel()), PRESETS["W8A16_TENSOR"].weight],
    ids=["int4", "nf4", "tensor"],
)
def test_codes_equal_those_of_a_plain_loop(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK", 5)
    monkeypatch.setattr(module, "_UNIT", 16)
    monkeypatch.setattr(module, "_LANES", 3)
    weight, h = layer(7, 36, seed=2)
    start = quantize(weight, spec)
    q = start
    for _ in range(2):
        for j in range(36):
            now = q.dequantize().double()
            slope = (weight.double() - now) @ h.double()
            now[:, j] += slope[:, j] / h[j, j].double()
            codes = q.codes.clone()
            codes[:, j] = quantize(now.float(), spec, scale=start.scale, zero=start.zero).codes[:, j]
            q = replace(q, codes=codes)
    found = refine(weight, start, h, sweeps=2, scales=False)
    assert found.scale is start.scale
    assert torch.equal(found.codes, q.codes)


@settings(LAWS, max_examples=40)
@given(specs(ranges=("minmax",)), st.booleans(), st.integers(0, 2**31))
def test_never_rises_in_any_row(spec: QuantSpec, scales: bool, seed: int):
    weight, h = layer(6, 23, seed)
    weight[1] = 0.0
    try:
        start = quantize(weight, spec)
    except NumericsError:  # a scale beyond its storage
        return
    found = refine(weight, start, h, sweeps=2, scales=scales)
    assert found.codes.dtype == start.codes.dtype
    assert bool((row_errors(weight, found, h) <= row_errors(weight, start, h)).all())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W4A16_CHANNEL", "NVFP4", "FP8_DYNAMIC"])
def test_scales_add_to_what_codes_gain(name: str):
    weight, h = layer(24, 128, seed=1)
    spec = PRESETS[name].weight.with_scale_dtype(FP16)
    start = quantize(weight, spec)
    codes, both = refine(weight, start, h, scales=False), refine(weight, start, h)
    assert layer_error(weight, codes, h) < layer_error(weight, start, h)
    assert layer_error(weight, both, h) < layer_error(weight, codes, h)
    if isinstance(start.scale, QTensor):
        assert torch.equal(both.scale.scale.float(), start.scale.scale.float())
    else:
        assert both.scale.dtype == start.scale.dtype
        assert bool((both.scale.float() > 0).all())


def test_negative_scales_keep_their_sign():
    weight, h = layer(24, 128, seed=1)
    spec = PRESETS["W4A16"].weight.with_scale_dtype(FP16)
    start = quantize(weight, replace(spec, range=get_range("weighted")))
    found = refine(weight, start, h)
    assert 0 < (start.scale < 0).sum() < start.scale.numel()
    assert torch.equal(found.scale < 0, start.scale < 0)
    assert not torch.equal(found.scale[start.scale < 0], start.scale[start.scale < 0])
    assert bool((row_errors(weight, found, h) < row_errors(weight, start, h)).all())


def test_powers_of_two_stay_what_they_are():
    weight, h = layer(24, 128, seed=1)
    start = quantize(weight, PRESETS["MXFP4"].weight)
    found = refine(weight, start, h)
    assert found.scale.dtype == torch.float8_e8m0fnu
    assert bool((row_errors(weight, found, h) < row_errors(weight, start, h)).all())


def test_what_is_given_is_left_alone():
    for rows in (1, 3):
        weight, h = layer(rows, 16)
        start = quantize(weight, int_weight(4))
        given = [t.clone() for t in (weight, h, start.codes, start.scale)]
        refine(weight, start, h)
        assert all(torch.equal(a, b) for a, b in zip(given, (weight, h, start.codes, start.scale), strict=True))


def test_a_scale_that_is_best_for_its_codes_stays():
    """With one group a row and codes given, the least-squares scale is reached at once."""
    weight, h = layer(5, 16, seed=3)
    spec = int_weight(8)
    start = quantize(weight * 1.2, spec)  # scales and values a fifth too large
    found = refine(weight, start, h, sweeps=30)
    u = found.codes.double()
    best = ((u @ h.double()) * weight.double()).sum(dim=1) / ((u @ h.double()) * u).sum(dim=1)
    assert torch.allclose(found.scale[:, 0].double(), best, rtol=1e-5)


def test_real_zero_points_move_too():
    weight, h = layer(12, 64, seed=4)
    spec = QuantSpec(get_format("int3"), per_group(16), zero_point="real", scale=FP16)
    start = quantize(weight + 0.05, spec)
    shifted = replace(start, zero=start.zero + torch.tensor(0.3, dtype=torch.float16))
    found = refine(weight, shifted, h, sweeps=8)
    assert found.zero.dtype == torch.float16
    assert not torch.equal(found.zero, shifted.zero)
    assert layer_error(weight, found, h) < 0.3 * layer_error(weight, shifted, h)


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K", "Q4_1"])
def test_minima_move_on_their_grid(name: str):
    weight, h = layer(24, 512, seed=5)
    spec = GGUF_TYPES[name]
    start = quantize(weight, spec)
    codes, both = refine(weight, start, h, scales=False, sweeps=3), refine(weight, start, h, sweeps=3)
    assert same(replace(codes, codes=start.codes), start)
    assert layer_error(weight, both, h) < 0.99 * layer_error(weight, codes, h)
    assert not torch.equal(scale_values(both.minimum), scale_values(start.minimum))
    for moved, before in ((both.scale, start.scale), (both.minimum, start.minimum)):
        if isinstance(before, QTensor):
            assert torch.equal(moved.scale, before.scale)
            assert not torch.equal(moved.codes, before.codes)
        else:
            assert moved.dtype == before.dtype


def test_scale_and_minimum_that_are_best_for_their_codes_are_found_together():
    """With one group a row and codes that no sweep moves, least squares in two unknowns are solved at once."""
    weight, h = layer(5, 16, seed=3)
    spec = QuantSpec(IntFormat(8, False), per_group(16), zero_point="minimum", scale=FP32, minimum=FP32)
    found = refine(weight, quantize(weight * 1.2 + 0.01, spec), h, sweeps=40)
    for row, line in enumerate(found.codes.double()):
        sides = torch.stack([line, -torch.ones(16, dtype=torch.float64)])
        normal = sides @ h.double() @ sides.t()
        best = torch.linalg.solve(normal, sides @ h.double() @ weight[row].double())
        assert torch.allclose(best[0], found.scale[row, 0].double(), rtol=1e-4)
        assert torch.allclose(best[1], found.minimum[row, 0].double(), rtol=1e-4, atol=1e-5)


def test_a_tile_without_a_scale_keeps_its_minimum():
    """As files of others have them: every code stands for -m."""
    weight, h = layer(4, 256, seed=6)
    start = quantize(weight, GGUF_TYPES["Q4_K"])
    start.scale.codes[:, 0] = 0
    found = refine(weight, start, h, sweeps=2)
    assert bool((found.scale.codes[:, 0] == 0).all())
    assert bool((row_errors(weight, found, h) < row_errors(weight, start, h)).all())


def test_tiles_of_several_rows_keep_their_scales():
    weight, h = layer(9, 40)
    start = quantize(weight, QuantSpec(get_format("int4"), Granularity(4, 10)))
    found = refine(weight, start, h)
    assert found.scale is start.scale
    assert layer_error(weight, found, h) < layer_error(weight, start, h)


def test_a_row_that_rises_keeps_all_it_had(monkeypatch: pytest.MonkeyPatch):
    weight, h = layer(6, 32)
    start = quantize(weight, int_weight(4, 16, asymmetric=True))
    found = refine(weight, start, h)
    calls = iter([torch.tensor([0.0, 2, 0, 2, 0, 0]), torch.ones(6)])
    monkeypatch.setattr(module, "row_errors", lambda *_: next(calls))
    kept = refine(weight, start, h)
    for row in range(6):
        source = start if row in (1, 3) else found
        assert torch.equal(kept.codes[row], source.codes[row])
        assert torch.equal(kept.scale[row], source.scale[row])
        assert torch.equal(kept.zero[row], source.zero[row])


def test_it_ends_when_nothing_moves(monkeypatch: pytest.MonkeyPatch):
    weight, h = layer(6, 32)
    start = quantize(weight, int_weight(4, 16))
    done = refine(weight, start, h, sweeps=200)
    sweeps: list[bool] = []
    once = module._Descent.sweep
    monkeypatch.setattr(module._Descent, "sweep", lambda self: sweeps.append(once(self)) or sweeps[-1])
    assert same(refine(weight, done, h, sweeps=200), done)
    assert sweeps == [False]
    assert same(refine(weight, start, h, sweeps=0), start)


def test_bad_input_is_refused_by_name():
    weight, h = layer(4, 16)
    start = quantize(weight, int_weight(4))
    with pytest.raises(NumericsError, match=r"k_proj: the diagonal of its Hessian has zeros"):
        refine(weight, start, torch.zeros(16, 16), name="k_proj")
    with pytest.raises(NumericsError, match=r"k_proj: 256 of the 256"):
        refine(weight, start, h * float("nan"), name="k_proj")
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"k_proj holds 1 NaN"):
        refine(weight, start, h, name="k_proj")
