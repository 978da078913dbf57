"""Errors of tiles and the choice among candidates: those of torch, bit for bit, under every format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import VECTOR_LEVELS, level, threads

from bitgrain.errors import KernelError
from bitgrain.kernels.grid import integer_grid, table_grid
from bitgrain.kernels.native import torch_only
from bitgrain.kernels.tile_search import best_candidates, tile_sums
from bitgrain.numerics import QuantSpec, get_format, per_group, per_tensor
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.native_grid import native_grid
from bitgrain.numerics.ranges import MSE, Weighted
from bitgrain.numerics.ranges.search import tile_error

pytest.importorskip("bitgrain._native", reason="the native module is not built")

FORMATS = [
    "int2",
    "int3",
    "int4",
    "int8",
    "uint4",
    "uint8",
    "fp4_e2m1",
    "fp8_e4m3",
    "fp8_e5m2",
    "nf4",
    "ternary",
    "binary",
]
SCALES = ["float32", "float16", "bfloat16", "e8m0"]


@st.composite
def spec(draw: st.DrawFn) -> QuantSpec:
    format = get_format(draw(st.sampled_from(FORMATS)))
    kinds = ["none", "real", *(["integer"] if format.name.startswith(("int", "uint")) else [])]
    zero = draw(st.sampled_from(kinds))
    scale = get_format(draw(st.sampled_from(SCALES[:3] if zero == "real" else SCALES)))
    restricted = zero == "none" and format.name.startswith("int") and draw(st.booleans())
    tile = draw(st.sampled_from([per_group(16), per_group(40), per_group(5), per_tensor()]))
    return QuantSpec(format, tile, zero, restricted=restricted, scale=scale)


def numbers(rows: int, cols: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    x[0, : cols // 2] = 0.0
    return x * 10.0 ** (seed % 5 - 2)


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(deadline=None, max_examples=40)
@given(spec=spec(), cols=st.integers(1, 90), seed=st.integers(0, 2**31), weighted=st.booleans())
def test_ranges_choose_as_torch_does(isa, spec, cols, seed, weighted):
    x = numbers(4, cols, seed)
    importance = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1)) if weighted else None
    for choice in (MSE(steps=9), Weighted(steps=3)):
        tiles = to_tiles(x, spec.granularity, choice.fill)
        weights = None if importance is None else to_tiles(importance, spec.granularity)
        with level(isa):
            scale, zero = choice.scale(tiles, spec, weights)
        with torch_only():
            expected, expected_zero = choice.scale(tiles, spec, weights)
        assert torch.equal(scale, expected)
        assert zero is None or (expected_zero is not None and torch.equal(zero, expected_zero))


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(deadline=None, max_examples=40)
@given(spec=spec(), n=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_errors_are_those_of_torch(isa, spec, n, seed):
    x = numbers(3, n, seed)
    scale = torch.tensor([0.3, 0.0, 2.0])
    zero = None if spec.symmetric else torch.tensor([0.0, 1.0, spec.low])
    with level(isa):
        found = tile_error(x, x.abs(), scale, zero, spec)
    with torch_only():
        assert torch.allclose(found, tile_error(x, x.abs(), scale, zero, spec), rtol=1e-15, atol=0)


def test_the_first_of_equal_candidates_is_taken():
    grid, x, error = (
        integer_grid(-8, 7),
        torch.tensor([[1.0, 2.0], [0.4, 0.4], [3.0, 0.0]]),
        torch.full((3,), torch.inf),
    )
    scale = torch.tensor([[1.0, 1.0, 4.0], [1.0, 0.2, 3.0], [0.5, 0.1, 1.0]])
    error = error.double()
    assert best_candidates(x, None, scale, None, grid, error).tolist() == [0, 1, 1]
    assert error[0] == 0
    assert best_candidates(x, None, scale, None, grid, error).tolist() == [-1, -1, -1]


def test_products_are_sums_over_the_tile():
    x, w = torch.tensor([[1.2, -2.0, 0.4]]), torch.tensor([[1.0, 2.0, 4.0]])
    grid, v = table_grid([-1.0, 0.0, 1.0], [-0.5, 0.5]), torch.tensor([1.0, -1.0, 0.0])
    error, wv, wvv, wxv = tile_sums(x, w, torch.ones(1), None, grid, products=True)[:, 0].tolist()
    assert wv == float((w * v).sum())
    assert wvv == float((w * v * v).sum())
    assert wxv == pytest.approx(float((w * x * v).sum()))
    assert error == pytest.approx(float((w * (x - v).square()).sum()))


def test_no_bit_depends_on_the_number_of_threads():
    x, spec = numbers(64, 640, 3), QuantSpec(get_format("int4"), per_group(64), "integer")
    with threads(1):
        alone = MSE(steps=5).scale(to_tiles(x, spec.granularity), spec)
    with threads(3):
        again = MSE(steps=5).scale(to_tiles(x, spec.granularity), spec)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True) if a is not None and b is not None)


def test_what_has_no_kernel():
    assert native_grid(QuantSpec(get_format("dynamic8"), per_group(16))) is None
    with pytest.raises(KernelError, match="2 to 16 numbers"):
        table_grid([0.0] * 17, [0.0] * 16)
    with pytest.raises(KernelError, match="candidates, 2"):
        tile_sums(torch.zeros(2, 4), None, torch.ones(3), None, integer_grid(-8, 7))
