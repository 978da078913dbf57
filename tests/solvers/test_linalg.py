"""Damping, dead channels, and the factor of the inverse Hessian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.solvers import linalg
from bitgrain.solvers.linalg import check_hessian, damp, inverse_factor, invert_lower
from random_specs import LAWS


def hessian(n: int, tokens: int = 0, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens or 4 * n, n, generator=torch.Generator().manual_seed(seed))
    return x.t() @ x / x.shape[0]


@settings(LAWS, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_factor_is_that_of_the_inverse(n: int, seed: int, reorder: bool):
    h = hessian(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) if reorder else None
    upper, damped = inverse_factor(h, 0.05, order=order)
    expected = h.double() + 0.05 * h.diagonal().double().mean() * torch.eye(n)
    assert torch.allclose(damped.matrix, expected, rtol=1e-12)
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    if order is not None:
        expected = expected[order][:, order]
    identity = upper.double().t() @ upper.double() @ expected
    assert torch.allclose(identity, torch.eye(n, dtype=torch.float64), atol=1e-4)
    assert damped.damping == 0.05
    assert damped.notes == ()


def test_triangular_inverse_by_halves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linalg, "_LEAF", 3)
    lower = torch.linalg.cholesky(hessian(23).double())
    assert torch.allclose(invert_lower(lower) @ lower, torch.eye(23, dtype=torch.float64), atol=1e-10)


def test_dead_channels_are_cut_off_and_counted():
    h = hessian(6)
    h[2] = h[:, 2] = 0.0
    damped = damp(h, 0.0)
    assert damped.notes == ("1 input channel is always zero: rounded to nearest",)
    live = [0, 1, 3, 4, 5]
    assert torch.equal(damped.matrix[live][:, live], h[live][:, live].double())
    assert damped.matrix[2, 2] > 0
    assert damped.matrix[2].count_nonzero() == 1
    h[4] = h[:, 4] = 0.0
    assert "2 input channels are" in damp(h).notes[0]
    # nothing but zeros: every channel is free
    assert torch.equal(damp(torch.zeros(3, 3), 0.0).matrix, torch.eye(3, dtype=torch.float64))


def test_damping_is_raised_until_the_factor_exists():
    h = hessian(8, tokens=3)  # of rank 3
    damped = damp(h, 0.0, name="q_proj")
    assert 0 < damped.damping <= 1e-4
    assert damped.notes == (f"damping was raised from 0 to {damped.damping:g}: its inputs are nearly dependent",)
    assert torch.allclose(damped.lower @ damped.lower.t(), damped.matrix)
    assert damp(h, 0.01).damping == 0.01

    indefinite = torch.eye(4) - 0.2
    indefinite[0, 1] = indefinite[1, 0] = 0.9  # smallest eigenvalue -0.13 of a mean diagonal of 0.8
    assert damp(indefinite, 0.002).damping == pytest.approx(0.2)


def test_damaged_statistics_are_refused_by_name():
    broken = torch.eye(4)
    broken[0, 1] = broken[1, 0] = 5.0
    with pytest.raises(NumericsError, match=r"layers\.3\.q_proj: .* not positive definite, even with damping 1"):
        damp(broken, name="layers.3.q_proj")
    for value in (float("nan"), float("inf")):
        bad = torch.eye(4)
        bad[1, 2] = bad[2, 1] = value
        with pytest.raises(NumericsError, match=r"up_proj: 2 of the 16 .* NaN or Inf"):
            damp(bad, name="up_proj")
    with pytest.raises(NumericsError, match=r"up_proj: .* negative"):
        check_hessian(-torch.eye(3), 3, "up_proj")
    with pytest.raises(SchemeError, match=r"up_proj has 4 input features, but .*\(3, 3\)"):
        check_hessian(torch.eye(3), 4, "up_proj")
