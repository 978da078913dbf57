"""Learned rotations: orthogonal, better than where they began, also on other tokens, and never worse."""

import math

import pytest
import torch

from bitgrain.numerics.hadamard import Rotation
from bitgrain.transforms.learn_rotation import Learned, learn_rotation


def tokens(count: int, n: int, seed: int) -> torch.Tensor:
    """With what a Hadamard matrix does not spread: directions that are sums of its columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator)
    columns = Rotation(n, 0).matrix().T
    x += 12 * torch.randn(count, 1, generator=generator) * (columns[3] + columns[9])
    return x


def peak(x: torch.Tensor, q: torch.Tensor) -> float:
    y = x @ q * (math.sqrt(len(q)) / x.norm(dim=-1, keepdim=True))
    return float(y.abs().amax(-1).square().mean())


@pytest.mark.parametrize("keep_mean", [False, True])
def test_peaks_fall(keep_mean: bool):
    n = 48
    start = Rotation(n, 0, keep_mean).matrix()
    q, before, after = learn_rotation(tokens(2000, n, 1), start, steps=60, keep_mean=keep_mean)
    assert torch.allclose(q @ q.T, torch.eye(n), atol=2e-6)
    assert after < 0.7 * before
    unseen = tokens(500, n, 2)
    assert peak(unseen, q) < 0.8 * peak(unseen, start)
    if keep_mean:
        ones = torch.ones(n)
        assert torch.allclose(ones @ q, ones, atol=1e-4)
        assert torch.allclose(q @ ones, ones, atol=1e-4)


def test_the_loss_is_the_mean_of_squared_norms():
    x, start = tokens(64, 16, 3), Rotation(16, 5).matrix()
    _, before, after = learn_rotation(x, start, steps=0)
    y = x @ start * (4 / x.norm(dim=-1, keepdim=True))
    assert before == after == pytest.approx(float(y.norm(p=8, dim=-1).square().mean()) / 16, rel=1e-5)


def test_never_worse_than_the_start():
    x, start = tokens(64, 16, 3), Rotation(16, 5).matrix()
    q, before, after = learn_rotation(x, start, steps=10, rate=50.0)  # steps far too long
    assert after <= before
    assert torch.allclose(q @ q.T, torch.eye(16), atol=1e-5)


def test_tokens_of_zeros_do_no_harm():
    x = torch.cat([torch.zeros(8, 16), tokens(8, 16, 0)])
    q, before, after = learn_rotation(x, Rotation(16, 5).matrix(), steps=10)
    assert math.isfinite(before)
    assert after <= before
    assert bool(torch.isfinite(q).all())


def test_it_acts_as_rotations_do():
    q = Rotation(16, 5).matrix()
    learned, x = Learned(q), tokens(4, 16, 0)
    assert learned.n == 16
    assert torch.allclose(learned(x), Rotation(16, 5)(x), atol=1e-4)
    assert torch.allclose(learned.undo(learned(x)), x, atol=1e-4)
