"""Solvers and transforms are found by name."""

from dataclasses import dataclass

import pytest
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.solvers import base, get_solver, register_solver, solver_names
from bitgrain.solvers.rtn import RoundToNearest


def test_known_names_in_any_case():
    assert "rtn" in solver_names()
    assert solver_names() == sorted(solver_names())
    assert isinstance(get_solver("rtn"), RoundToNearest)
    assert isinstance(get_solver("RTN"), RoundToNearest)
    assert get_solver("rtn").needs_calibration is False


def test_unknown_name_lists_all():
    with pytest.raises(SchemeError, match=r"unknown solver 'magic'; known solvers: .*rtn"):
        get_solver("magic")


def test_settings_have_names_and_types(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_SOLVERS", dict(base._SOLVERS))

    @register_solver("shaky")
    @dataclass(frozen=True)
    class Shaky:
        damping: float = 0.5
        order: str = "act"
        factors: tuple[float, ...] = (1.0,)

    assert get_solver({"name": "shaky", "damping": 1, "factors": [1, 2]}) == Shaky(1.0, "act", (1, 2))
    with pytest.raises(SchemeError, match=r"solver 'shaky' has no setting 'dumping'; it has: damping, order, factors"):
        get_solver({"name": "shaky", "dumping": 1})
    with pytest.raises(SchemeError, match=r"solver 'shaky': order is a str, not 3"):
        get_solver({"name": "shaky", "order": 3})


def test_a_new_solver_is_one_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_SOLVERS", dict(base._SOLVERS))

    @register_solver("identity")
    class Identity(nn.Module):
        needs_calibration = False

    assert isinstance(get_solver("Identity"), Identity)
    assert "identity" in solver_names()
