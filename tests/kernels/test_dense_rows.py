"""A few rows against a dense weight: every level equals torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import VECTOR_LEVELS

from bitgrain.errors import KernelError
from bitgrain.kernels.code_linear import rounds_inputs
from bitgrain.kernels.dense_rows import EXACT_ROWS, dense_rows
from bitgrain.kernels.native import native

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), m=st.integers(0, 19), n=st.integers(1, 40), k=st.integers(1, 100), x_dtype=DTYPES,
    dtype=DTYPES, with_bias=st.booleans(),
)  # fmt: skip
def test_equals_torch(isa, seed, m, n, k, x_dtype, dtype, with_bias):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=made).to(x_dtype)
    weight = torch.randn(n, k + 3, generator=made).to(dtype)[:, :k]
    bias = torch.randn(n, generator=made) if with_bias else None
    before = native().isa()
    native().use_isa(isa)
    try:
        y = dense_rows(x, weight, bias)
        rounded = m > EXACT_ROWS and dtype == torch.bfloat16 and rounds_inputs(1)
    finally:
        native().use_isa(before)
    x = x.bfloat16() if rounded else x
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.abs())
    assert y.shape == (m, n)
    assert y.dtype == x_dtype
    error = torch.finfo(x_dtype).eps * exact.abs() + torch.finfo(x_dtype).smallest_normal
    assert ((y.double() - exact).abs() <= (k / 16 + 8) * 2.0**-24 * size + error).all()


def test_wrong_inputs_are_told():
    with pytest.raises(KernelError, match="inputs have 7 features, the weight has 8"):
        dense_rows(torch.ones(1, 7), torch.ones(3, 8))
    with pytest.raises(KernelError, match="float64"):
        dense_rows(torch.ones(1, 8), torch.ones(3, 8, dtype=torch.float64))
