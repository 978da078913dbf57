"""Columns kept beside the codes, under every solver: exact, and without a say in how the others are rounded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.columns import ColumnChoice
from bitgrain.numerics.spec import int_weight
from bitgrain.solvers import Moments, get_solver, solver_names
from bitgrain.solvers.beside import solve_beside, solve_matrix
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.guard import solve_guarded
from bitgrain.solvers.objective import layer_error
from random_specs import LAWS, same, specs

QUICK = {"clip": {"steps": 3}, "hqq": {"iterations": 3}, "least_squares": {"iterations": 3}}
KEPT = ColumnChoice(0.2, "random")


def layer(rows: int = 6, cols: int = 24, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.1
    x = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return weight, Moments(x.T @ x / len(x), len(x))


@pytest.mark.parametrize("name", solver_names())
@settings(LAWS, max_examples=15)
@given(specs(columns=(KEPT, ColumnChoice(0.1), ColumnChoice(0.3, "weight")), outliers=(0.0, 0.1)), st.integers(0, 99))
def test_every_solver_and_spec(name, spec, seed):
    weight, moments = layer(5, 21, seed)
    solver = get_solver({"name": name, **QUICK.get(name, {})})
    magnitude = torch.rand(21, generator=torch.Generator().manual_seed(seed))
    found = solve_matrix(solver, weight, spec, moments, magnitude=magnitude)
    assert spec.columns is not None
    assert found.q.spec == spec
    assert found.q.columns is not None
    index = spec.columns.choose(weight, magnitude)
    assert torch.equal(found.q.columns.index, index)
    dense = found.q.dequantize()
    assert torch.equal(dense[:, index], weight[:, index].half().float())
    assert bool(torch.isfinite(dense).all())
    assert not any("always zero" in note for note in found.notes)
    # neither the kept weights nor their inputs say anything to the others
    other, noise = weight.clone(), moments.hessian.clone()
    other[:, index] = 77.0
    noise[:, index] *= 3.0
    noise[index] *= 3.0
    again = solve_beside(
        lambda w, plain, known, _: solver.solve(w, plain, known), other, spec, index, replace(moments, hessian=noise)
    )
    assert same(replace(again.q, columns=found.q.columns), found.q)


@pytest.mark.parametrize("order", ["act", "none"])
def test_gptq_rounds_the_others_as_if_they_were_alone(order: str):
    weight, moments = layer(8, 40, 1)
    spec = replace(int_weight(3), columns=KEPT)
    solver = GPTQ(damping=0.0, order=order)
    found = solve_matrix(solver, weight, spec, moments).q
    assert found.columns is not None
    rest = torch.ones(40, dtype=torch.bool)
    rest[found.columns.index] = False
    alone = solver.solve(weight[:, rest], int_weight(3), replace(moments, hessian=moments.hessian[rest][:, rest])).q
    assert torch.equal(found.codes[:, rest], alone.codes)
    assert torch.equal(found.scale, alone.scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_gains_beside_them_too_and_they_gain_themselves(bits: int):
    weight, moments = layer(16, 64, bits)
    weight[:, 5] *= 20
    spec = int_weight(bits, 32)
    kept = replace(spec, columns=ColumnChoice(0.05, "weight"))
    errors = {
        (solver, one.columns is not None): layer_error(
            weight, solve_matrix(get_solver(solver), weight, one, moments).q, moments.hessian
        )
        for solver in ("rtn", "gptq")
        for one in (spec, kept)
    }
    assert errors["gptq", True] < 0.8 * errors["rtn", True]
    assert errors["rtn", True] < 0.7 * errors["rtn", False]
    assert errors["gptq", True] < 0.7 * errors["gptq", False]


def test_the_columns_of_a_target_are_kept():
    weight, moments = layer()
    target = weight + 0.01
    spec = replace(int_weight(4), columns=KEPT)
    index = KEPT.choose(weight)
    found = solve_beside(
        lambda w, plain, known, aim: solve_guarded(w, plain, known or moments, [GPTQ()], target=aim),
        *(weight, spec, index, moments),
        target=target,
    )
    assert found.q.columns is not None
    assert torch.equal(found.q.columns.values, target[:, index].half())
    assert found.figures["loss"] <= found.figures["rtn_loss"]


def test_bad_input():
    weight, _ = layer()
    with pytest.raises(SchemeError, match=r"m\.up: which columns are kept by activation"):
        solve_matrix(get_solver("rtn"), weight, replace(int_weight(4), columns=ColumnChoice(0.1)), name="m.up")
    weight[2, int(KEPT.choose(weight)[0])] = float("nan")
    with pytest.raises(NumericsError, match=r"m\.up holds 1 NaN"):
        solve_matrix(get_solver("rtn"), weight, replace(int_weight(4), columns=KEPT), name="m.up")
