"""The target of a layer whose inputs have changed, against a direct least-squares solution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.solvers import Moments
from bitgrain.solvers.target import target_weight
from random_specs import LAWS

ROWS, COLS, TOKENS = 5, 7, 60


def layer(seed: int) -> tuple[torch.Tensor, ...]:
    """W, the inputs in full precision, those of the quantized model, what the residual stream lacks; float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, COLS, generator=generator, dtype=torch.float64)
    full = torch.randn(TOKENS, COLS, generator=generator, dtype=torch.float64)
    seen = full + 0.1 * torch.randn(TOKENS, COLS, generator=generator, dtype=torch.float64)
    lacking = 0.1 * torch.randn(TOKENS, ROWS, generator=generator, dtype=torch.float64)
    return w, full, seen, lacking


def moments(full: torch.Tensor, seen: torch.Tensor, lacking: torch.Tensor) -> Moments:
    n = seen.shape[0]
    return Moments(
        (seen.t() @ seen / n).float(), n, cross=(full.t() @ seen / n).float(), residual=(lacking.t() @ seen / n).float()
    )


@settings(LAWS, max_examples=25)
@given(
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.01, 1.0]),
    st.integers(0, 2**31),
)
def test_is_the_regularized_least_squares_solution(a: float, b: float, damping: float, seed: int):
    w, full, seen, lacking = layer(seed)
    found = target_weight(w.float(), moments(full, seen, lacking), inputs=a, residual=b, damping=damping)
    # the pull towards W is the same as further rows sqrt(l) I, whose outputs are to be sqrt(l) W
    ridge = (damping * (seen.square().mean(dim=0).mean()) * TOKENS).sqrt() * torch.eye(COLS, dtype=torch.float64)
    wanted = a * full @ w.t() + (1 - a) * seen @ w.t() + b * lacking
    solution = torch.linalg.lstsq(torch.cat([seen, ridge]), torch.cat([wanted, ridge @ w.t()])).solution
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), solution.t(), atol=2e-5)


def test_nothing_known_means_nothing_changed():
    w, full, seen, lacking = layer(0)
    known = moments(full, seen, lacking)
    assert target_weight(w, Moments(known.hessian, TOKENS)) is w
    assert target_weight(w, known, inputs=0, residual=0) is w
    assert target_weight(w, Moments(torch.zeros(COLS, COLS), 0, cross=known.cross)) is w
    same = Moments(known.hessian, TOKENS, cross=known.hessian)
    assert torch.equal(target_weight(w.float(), same), w.float())


def test_more_undone_means_nearer_to_the_outputs_of_the_full_model():
    w, full, seen, lacking = layer(3)
    known = moments(full, seen, lacking)

    def error(a: float) -> float:
        t = target_weight(w.float(), known, inputs=a, residual=0, damping=1e-6).double()
        return float((full @ w.t() - seen @ t.t()).square().sum())

    assert error(1.0) < error(0.5) < error(0.0)


def test_a_channel_without_inputs_keeps_its_weights():
    w, full, seen, lacking = layer(1)
    full, seen = full.clone(), seen.clone()
    full[:, 2] = seen[:, 2] = 0.0
    found = target_weight(w.float(), moments(full, seen, lacking))
    assert torch.equal(found[:, 2], w.float()[:, 2])
    assert not torch.equal(found[:, 1], w.float()[:, 1])


def test_damaged_statistics_are_refused_by_name():
    w, full, seen, lacking = layer(1)
    known = moments(full, seen, lacking)
    bad = known.cross.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"o_proj: the cross moments .* NaN or Inf"):
        target_weight(w, Moments(known.hessian, TOKENS, cross=bad), name="o_proj")
    with pytest.raises(NumericsError, match=r"o_proj: 49 of the 49"):
        target_weight(w, Moments(known.hessian * float("nan"), TOKENS, cross=known.cross), name="o_proj")
    with pytest.raises(SchemeError, match=r"o_proj: the moments of the residual stream have the shape \(7, 5\)"):
        target_weight(w, Moments(known.hessian, TOKENS, residual=known.residual.t()), name="o_proj")
