"""Round to nearest works piece by piece, and equals `numerics.quantize` of the whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError
from bitgrain.numerics import QuantSpec, dequantize, get_format, per_tensor, quantize
from bitgrain.numerics.ranges import get_range
from bitgrain.recipes import PRESETS
from bitgrain.solvers import get_solver, rtn
from bitgrain.solvers.rtn import RoundToNearest, has_one_outer_scale, shared_outer_scale
from random_specs import LAWS, PLAIN, same, specs


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1
    x[rows // 2, 0] = 5.0
    x[-1] = 0.0
    return x


@pytest.fixture(params=[1, 300, 1 << 11])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From single tile rows to a few pieces."""
    monkeypatch.setattr(rtn, "_PIECE", request.param)
    return request.param


@pytest.mark.parametrize("name", PLAIN)
def test_pieces_do_not_matter(name: str, piece: int):
    spec = PRESETS[name].weight
    x = weights(150, 128).to(torch.bfloat16)
    assert same(get_solver("rtn").solve(x, spec).q, quantize(x, spec))


def test_the_real_piece_size_splits_a_real_matrix():
    x = weights(700, 512)
    for name in ("W4A16", "NVFP4", "FP8_BLOCK", "W8A16_TENSOR"):
        spec = PRESETS[name].weight
        assert x.numel() > rtn._PIECE
        assert same(get_solver("rtn").solve(x, spec).q, quantize(x, spec))


@settings(LAWS, max_examples=30)
@given(specs(ranges=("minmax", "percentile")), st.integers(0, 2**31))
def test_pieces_do_not_matter_for_any_spec(spec: QuantSpec, seed: int):
    x = weights(9, 17, seed)
    before, rtn._PIECE = rtn._PIECE, 1
    try:
        try:
            whole = quantize(x, spec)
        except NumericsError:  # a scale beyond its storage
            with pytest.raises(NumericsError):
                get_solver("rtn").solve(x, spec)
            return
        assert same(get_solver("rtn").solve(x, spec).q, whole)
    finally:
        rtn._PIECE = before


def test_importance_reaches_the_range(piece: int):
    spec = replace(PRESETS["W2A16_ASYM"].weight, range=get_range("weighted"))
    x, importance = weights(6, 64), torch.linspace(0.01, 3.0, 64)
    found = RoundToNearest().round(x, spec, importance)
    assert same(found, quantize(x, spec, importance=importance))
    assert not same(found, quantize(x, spec, importance=importance.flip(0)))


def test_shared_outer_scale_is_that_of_the_joined_matrix(piece: int):
    spec = PRESETS["NVFP4"].weight
    parts = [weights(40, 64, 1), weights(24, 64, 2) * 30, weights(8, 64, 3)]
    joined = quantize(torch.cat(parts), spec)
    outer = shared_outer_scale(parts, spec)
    assert torch.equal(outer.float(), joined.scale.scale.float())
    solved = [get_solver("rtn").solve(part, spec, outer_scale=outer).q for part in parts]
    assert torch.equal(torch.cat([dequantize(q) for q in solved]), dequantize(joined))
    assert all(torch.equal(q.scale.scale.float(), outer.float()) for q in solved)


def test_which_specs_have_one_outer_scale():
    assert [name for name, scheme in PRESETS.items() if has_one_outer_scale(scheme.weight)] == ["NVFP4A16", "NVFP4"]
    by_row = QuantSpec(get_format("fp8_e4m3"), PRESETS["W8A16"].weight.granularity)
    assert not has_one_outer_scale(replace(PRESETS["NVFP4"].weight, scale=by_row))
    assert has_one_outer_scale(replace(PRESETS["W4A16"].weight, scale=QuantSpec(get_format("int8"), per_tensor())))


@pytest.mark.parametrize("name", ["W4A16", "NVFP4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_errors_name_the_tensor(name: str, bad: float, piece: int):
    x = weights(64, 128)
    x[60, 5] = bad
    with pytest.raises(NumericsError, match=r"model\.q_proj\.weight holds 1|model\.q_proj\.weight holds 0 NaN and 1"):
        get_solver("rtn").solve(x, PRESETS[name].weight, name="model.q_proj.weight")
    if name == "NVFP4":
        with pytest.raises(NumericsError, match="a \\+ b holds"):
            shared_outer_scale([x], PRESETS[name].weight, "a + b")
