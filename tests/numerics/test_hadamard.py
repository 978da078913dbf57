"""Rotations of any size: orthogonal, flat where a Hadamard matrix is known, and the fast product is the matrix's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.numerics.hadamard import Rotation, paley

PALEY = [4, 8, 12, 20, 24, 28, 36, 44, 48, 52, 60, 68, 76, 84, 100, 108, 140]


@pytest.mark.parametrize("order", PALEY)
def test_paley(order: int):
    matrix = paley(order) * order**0.5
    assert torch.equal(matrix.abs().round(decimals=6), torch.ones_like(matrix))
    torch.testing.assert_close(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 24, 40, 64, 80, 128, 144, 160, 256, 272, 384, 448, 896])
def test_hadamard_sizes_are_flat(n: int):
    matrix = Rotation(n, 3).matrix()
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(0, 5), st.booleans())
def test_orthogonal_fast_and_undone(n: int, seed: int, keep_mean: bool):
    rotation = Rotation(n, seed, keep_mean)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=2e-6)
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rotation(x), x @ matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation.undo(rotation(x)), x, rtol=1e-5, atol=1e-5)
    if keep_mean:
        torch.testing.assert_close(rotation(torch.ones(n)), torch.ones(n), rtol=1e-5, atol=1e-5)


def test_seeds_differ_and_repeat():
    assert torch.equal(Rotation(24, 1).matrix(), Rotation(24, 1).matrix())
    assert not torch.equal(Rotation(24, 1).matrix(), Rotation(24, 2).matrix())


@pytest.mark.parametrize("keep_mean", [False, True])
def test_an_outlier_is_spread(keep_mean: bool):
    x = torch.zeros(256)
    x[17] = 100.0
    assert Rotation(256, 0, keep_mean)(x).abs().max() < 40
