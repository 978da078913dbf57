"""X^T X: at least as near to the exact sums as torch, the same bits for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, level, threads

from bitgrain.errors import KernelError
from bitgrain.kernels.gram import add_gram, gram, mirror
from bitgrain.kernels.native import torch_only

pytest.importorskip("bitgrain._native", reason="the native module is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(tokens: int, k: int, dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


@pytest.mark.parametrize("isa", LEVELS)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 127, 129, 511, 513, 700]),
    k=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_the_upper_triangle_is_the_sum(isa, tokens, k, dtype, gap, seed):
    x = rows(tokens, k + gap, dtype, seed)[:, :k]
    before = rows(k, k, torch.float32, seed + 1)
    with level(isa):
        found = add_gram(before.clone(), x)
    exact = before.double() + x.double().T @ x.double()
    size = before.double().abs() + x.double().abs().T @ x.double().abs()
    assert (((found - exact).abs() - 100 * 2.0**-24 * size).triu() <= 0).all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_is_as_exact_as_torch(isa, dtype, mean):
    x = rows(8192, 64, dtype, mean=mean)
    exact = x.double().T @ x.double()
    found, torchs = torch.zeros(64, 64), torch.zeros(64, 64)
    for piece in x.split(512):
        with level(isa):
            add_gram(found, piece)
        with torch_only():
            add_gram(torchs, piece)
    mine, other = ((mirror(one.clone()) - exact).square().mean() for one in (found, torchs))
    assert mine <= other


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_integers_are_exact(isa, dtype):
    x = torch.randint(-8, 9, (1100, 100), generator=torch.Generator().manual_seed(0)).to(dtype)
    with level(isa):
        assert torch.equal(mirror(gram(x)).double(), x.double().T @ x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_number_of_threads(dtype):
    x = rows(600, 500, dtype)
    with threads(1):
        alone = mirror(gram(x))
    with threads(3):
        assert torch.equal(mirror(gram(x)), alone)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_mirror(k):
    h = rows(k, k, torch.float32)
    expected = h.triu() + h.triu(1).T
    with torch_only():
        assert torch.equal(mirror(h.clone()), expected)
    assert mirror(h) is h
    assert torch.equal(h, expected)


def test_other_inputs_go_to_torch():
    x = rows(20, 8, torch.float64)
    assert torch.allclose(gram(x).double(), x.T @ x, atol=1e-4)
    with pytest.raises(KernelError, match="8 features do not fit"):
        add_gram(torch.zeros(7, 7), x)
