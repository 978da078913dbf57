"""Norms, gated activations and rotations of rows: every level equals the twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import VECTOR_LEVELS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitgrain.errors import KernelError
from bitgrain.kernels.native import native
from bitgrain.kernels.reference import rows as twin
from bitgrain.kernels.rows import ACTS, ROTARY, ModuleNorm, RowNorm, gated, rotate_

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
ROWS = st.sampled_from([0, 1, 3, 8, 17])


@pytest.fixture(params=VECTOR_LEVELS)
def level(request: pytest.FixtureRequest):
    before = native().isa()
    native().use_isa(request.param)
    yield request.param
    native().use_isa(before)


def at_level(isa, run):
    before = native().isa()
    native().use_isa(isa)
    try:
        return run()
    finally:
        native().use_isa(before)


def rounding(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).smallest_normal


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, width=st.integers(1, 200), dtype=DTYPES, centered=st.booleans(), parts=st.integers(0, 3))
def test_norms_equal_their_twin(isa, seed, rows, width, dtype, centered, parts):
    made = torch.Generator().manual_seed(seed)
    x = (4 * torch.randn(rows, width, generator=made) + 1).to(dtype)
    weight = torch.randn(width, generator=made) if parts & 1 else None
    bias = torch.randn(width, generator=made) if parts & 2 else None
    y = at_level(isa, lambda: RowNorm(width, weight, bias, eps=1e-5, centered=centered)(x))
    exact = twin.norm(x, weight, bias, 1e-5, centered)
    assert y.dtype == dtype
    assert y.shape == x.shape
    # a centered row is a difference of numbers that may be much larger than it
    size = twin.norm(x, weight, bias, 1e-5, centered).abs() + (0 if bias is None else bias.abs())
    if centered:
        deviation = (
            x.double().square().mean(-1, keepdim=True) - x.double().mean(-1, keepdim=True).square() + 1e-5
        ).sqrt()
        size = size + x.double().abs().amax(-1, keepdim=True) / deviation * (1 if weight is None else weight.abs())
    assert ((y.double() - exact).abs() <= (width / 16 + 16) * 2.0**-24 * size + rounding(y, exact)).all()


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, width=st.integers(1, 70), dtype=DTYPES, act=st.sampled_from(list(ACTS)), up=st.booleans())
def test_gated_activations_equal_their_twin(isa, seed, rows, width, dtype, act, up):
    made = torch.Generator().manual_seed(seed)
    both = (6 * torch.randn(rows, 2 * width, generator=made)).to(dtype)
    gate, other = both.split(width, -1)  # rows that lie apart
    y = at_level(isa, lambda: gated(gate, other if up else None, act))
    exact = twin.gated(gate, other if up else None, act)
    size = gate.double().square() if act == "relu_squared" else gate.double().abs()
    size = size * other.double().abs() if up else size
    assert y.shape == gate.shape
    assert ((y.double() - exact).abs() <= 2.0**-20 * size + rounding(y, exact)).all()


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), seed=SEEDS, rows=ROWS, heads=st.integers(1, 3), dtype=DTYPES, rotary=st.sampled_from(list(ROTARY))
)
def test_rotations_equal_their_twin(isa, data, seed, rows, heads, dtype, rotary):
    made = torch.Generator().manual_seed(seed)
    half = data.draw(st.integers(1, 40))
    size = 2 * half + data.draw(st.integers(0, 20))
    positions = data.draw(st.sampled_from([1, max(rows, 1)]))
    x = torch.randn(rows, heads, size, generator=made).to(dtype)
    cos, sin = (torch.randn(positions, 2 * half, generator=made).to(dtype) for _ in range(2))
    y = at_level(isa, lambda: rotate_(x.clone(), cos, sin, rotary))
    exact = twin.rotate(x, cos, sin, rotary)
    bound = (
        2.0**-21 * x.double().abs().amax((-1, -2), keepdim=True).clamp(min=1) * (1 + cos.abs().max() + sin.abs().max())
    )
    assert ((y.double() - exact).abs() <= bound + rounding(y, exact)).all()


def test_a_row_that_is_not_finite_stays_so(level):
    x = torch.ones(3, 20)
    x[1, 3] = torch.nan
    y = RowNorm(20, None, eps=1e-6)(x)
    assert y[[0, 2]].isfinite().all()
    assert y[1].isnan().all()
    assert gated(x, None, "silu")[1, 3].isnan()


def test_what_does_not_fit_is_told():
    with pytest.raises(KernelError, match="a norm of 8 features has a weight of shape"):
        RowNorm(8, torch.ones(7), eps=1e-6)
    with pytest.raises(KernelError, match="differ"):
        gated(torch.ones(2, 8), torch.ones(2, 7), "silu")
    with pytest.raises(KernelError, match="do not fit"):
        rotate_(torch.ones(2, 1, 8), torch.ones(1, 10), torch.ones(1, 10), "half")
    with pytest.raises(KernelError, match="float64"):
        RowNorm(8, None, eps=1e-6)(torch.ones(2, 8, dtype=torch.float64))


@given(st.sampled_from([16, 64, 130, 2048, 5000, 11008]), ROWS, DTYPES, SEEDS, st.sampled_from([1e-6, 1e-5, 1e-3]))
@settings(max_examples=60, deadline=None)
def test_a_norm_with_the_bits_of_modules(width: int, rows: int, dtype: torch.dtype, seed: int, eps: float):
    module = LlamaRMSNorm(width, eps).requires_grad_(False).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    module.weight.copy_(torch.randn(width, generator=generator))
    x = (torch.randn(rows, 1, width, generator=generator) * 10 ** float(torch.rand(1, generator=generator))).to(dtype)
    try:
        norm = ModuleNorm(module.weight, eps)
    except KernelError:
        pytest.skip("torch sums in another order here")
    for part in (x, *x.split(1)):
        assert norm(part).equal(module(part))


def test_norms_of_modules_that_cannot_be():
    with pytest.raises(KernelError, match="unknown order"):
        ModuleNorm(torch.ones(40_000), 1e-5)
    try:
        norm = ModuleNorm(torch.ones(64), 1e-5)
    except KernelError:
        pytest.skip("torch sums in another order here")
    for x in (torch.ones(1, 32), torch.ones(1, 64, dtype=torch.float16), torch.ones(64, 2).t()):
        with pytest.raises(KernelError, match="cannot read"):
            norm(x)
