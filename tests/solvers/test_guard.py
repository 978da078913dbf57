"""The guard: the least measured error wins, and it is never above that of round to nearest."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError
from bitgrain.numerics import QuantSpec, quantize
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS
from bitgrain.solvers import Moments, Solution, get_solver
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.guard import solve_guarded
from bitgrain.solvers.objective import layer_error
from bitgrain.solvers.rtn import RoundToNearest, shared_outer_scale
from random_specs import LAWS, same, specs

W4 = int_weight(4, 16, asymmetric=True)


def layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.1
    mix = torch.eye(cols) + 2 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=generator) @ mix
    return weight, Moments(x.t() @ x / x.shape[0], x.shape[0])


@dataclass(frozen=True)
class Scaled:
    """Rounds a multiple of the weight: 1 is round to nearest, anything else is worse."""

    factor: float
    needs_calibration: ClassVar[bool] = False

    def solve(self, weight, spec, moments=None, *, outer_scale=None, name="weight") -> Solution:
        q = quantize(weight * self.factor, spec, outer_scale=outer_scale)
        return Solution(q, f"scaled by {self.factor}", {"factor": self.factor}, (f"note of {self.factor}",))


def test_the_best_wins_with_its_figures_and_notes():
    weight, moments = layer(16, 48)
    found = solve_guarded(weight, W4, moments, [Scaled(2.0), GPTQ(), GPTQ(sweeps=4), Scaled(1.5)])
    best = GPTQ(sweeps=4).solve(weight, W4, moments)
    assert found.method == "gptq"
    assert same(found.q, best.q)
    power = layer_error(weight, torch.zeros_like(weight), moments.hessian)
    rtn = RoundToNearest().solve(weight, W4, moments).q
    assert found.figures["damping"] == 0.01
    assert found.figures["loss"] == pytest.approx(layer_error(weight, best.q, moments.hessian) / power)
    assert found.figures["rtn_loss"] == pytest.approx(layer_error(weight, rtn, moments.hessian) / power)


def test_worse_solvers_lose_to_round_to_nearest_and_so_do_equal_ones():
    weight, moments = layer(16, 48)
    rtn = RoundToNearest().solve(weight, W4, moments).q
    for solvers in ([], [Scaled(2.0), Scaled(0.5)], [Scaled(1.0)]):
        found = solve_guarded(weight, W4, moments, solvers)
        assert found.method == "rtn"
        assert found.notes == ()
        assert found.figures["loss"] == found.figures["rtn_loss"]
        assert same(found.q, rtn)
    found = solve_guarded(weight, W4, moments, [Scaled(1.0)], target=weight * 3)
    assert found.method == "scaled by 1.0"
    assert found.notes == ("note of 1.0",)


@settings(LAWS, max_examples=15)
@given(specs(), st.integers(0, 2**31), st.booleans())
def test_never_worse_than_round_to_nearest(spec: QuantSpec, seed: int, moved: bool):
    weight, moments = layer(6, 21, seed)
    target = weight + 0.02 * torch.randn(6, 21, generator=torch.Generator().manual_seed(seed)) if moved else None
    try:
        rtn = RoundToNearest().solve(weight, spec, moments).q
    except NumericsError:  # a scale beyond its storage
        return
    found = solve_guarded(weight, spec, moments, [GPTQ(order="none"), Scaled(1.3)], target=target)
    goal = weight if target is None else target
    assert layer_error(goal, found.q, moments.hessian) <= layer_error(goal, rtn, moments.hessian)
    assert found.figures["loss"] <= found.figures["rtn_loss"]


def test_solvers_round_the_target_and_rtn_the_weight():
    weight, moments = layer(16, 48)
    target = weight + 0.03
    found = solve_guarded(weight, W4, moments, [GPTQ()], target=target)
    assert same(found.q, GPTQ().solve(target, W4, moments).q)
    power = layer_error(weight, torch.zeros_like(weight), moments.hessian)
    rtn = RoundToNearest().solve(weight, W4, moments).q
    assert found.figures["rtn_loss"] == pytest.approx(layer_error(target, rtn, moments.hessian) / power)


def test_outer_scale_reaches_everyone():
    weight, moments = layer(16, 64)
    spec = PRESETS["NVFP4"].weight
    outer = shared_outer_scale([weight * 5], spec)
    for solvers in ([], [get_solver("gptq")]):
        found = solve_guarded(weight, spec, moments, solvers, outer_scale=outer)
        assert torch.equal(found.q.scale.scale.float(), outer.float())


def test_without_tokens_it_is_round_to_nearest_with_zero_losses():
    weight, _ = layer(8, 32)
    found = solve_guarded(weight, W4, Moments(torch.zeros(32, 32), 0), [GPTQ()])
    assert found.method == "rtn"
    assert found.figures == {"loss": 0.0, "rtn_loss": 0.0}


def test_damaged_statistics_are_refused_by_name():
    weight, moments = layer(8, 32)
    with pytest.raises(NumericsError, match=r"gate_proj: 1024 of the 1024"):
        solve_guarded(weight, W4, Moments(moments.hessian * float("nan"), 5), [], name="gate_proj")
