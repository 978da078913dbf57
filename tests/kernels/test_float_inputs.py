"""FP8 weights and inputs rounded to FP8 and FP4: every number and every rounding, at every level."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, level

from bitgrain.kernels.code_linear import FLOAT8, CodeLinear
from bitgrain.kernels.float_inputs import FORMATS, FloatInputs
from bitgrain.kernels.reference.float_inputs import round_inputs, round_to_grid
from bitgrain.numerics import get_format

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native module was not built")


def identity(k: int, inputs: FloatInputs, group: int | None = None) -> CodeLinear:
    """W = I in E4M3: its outputs are its inputs, as rounded."""
    codes = torch.eye(k).to(torch.float8_e4m3fn)
    scale = torch.ones(k, -(-k // (group or k)))
    return CodeLinear.pack(codes.view(torch.uint8), scale, 8, codes.dtype, group=group, inputs=inputs)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_codes(isa: str, dtype: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    with level(isa):
        linear = CodeLinear.pack(codes.view(256, 1), torch.ones(256, 1), 8, dtype)
        found = [linear(torch.ones(m, 1)) for m in (1, 2, 5, 60)]
    for y in found:
        assert torch.equal(y.nan_to_num(nan=1e30), codes.view(dtype).float().nan_to_num(nan=1e30).expand_as(y))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_the_format(isa: str, name: str):
    format, grid = get_format(name), FORMATS[name]
    assert (format.maximum, format.overflow) == (grid.largest, grid.overflow)
    numbers = format.grid()
    middles = (numbers[1:] + numbers[:-1]) / 2  # ties
    near = [middles.nextafter(torch.tensor(end)) for end in (-1e9, 1e9)]
    beyond = torch.tensor([grid.overflow, -grid.overflow, 1e30, -1e30, 1e-30, -1e-42])
    x = torch.cat([numbers, middles, *near, beyond]).view(1, -1)
    with level(isa):
        y = identity(x.shape[1], FloatInputs(name, "fixed"))(x)
    assert torch.equal(y, format.round(x))
    assert torch.equal(round_to_grid(x, grid), format.round(x))


@pytest.mark.parametrize("isa", LEVELS)
@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    scale=st.sampled_from(["float32", "e8m0", "e4m3"]),
    group=st.sampled_from([None, 16, 32, 7]),
    size=st.sampled_from([1.0, 1e-3, 1e4, 1e-30, 1e-40, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_scales_are_those_of_the_twin(isa, name, scale, group, size, dtype, seed):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)).mul_(size).to(dtype)
    x[1, 20:], x[2] = 0.0, 0.0
    inputs = FloatInputs(name, scale, group is not None, 0.25)
    with level(isa):
        y = identity(50, inputs, group)(x.float())
    values, steps = round_inputs(x, inputs, group)
    assert torch.equal(y, values * steps)


@pytest.mark.parametrize("isa", LEVELS)
def test_what_is_not_finite_is_seen(isa: str):
    x = torch.ones(3, 64)
    x[0, 40], x[1, 3] = torch.inf, torch.nan
    for inputs in (FloatInputs("fp8_e4m3"), FloatInputs("fp8_e4m3", groups=True), FloatInputs("fp4_e2m1", "fixed")):
        with level(isa):
            y = identity(64, inputs, 32)(x)
        assert y[:2].isnan().all()
        assert y[2].equal(x[2])
