"""Solvers pick the codes of a weight matrix: one file each, looked up by name."""

from bitgrain.solvers import clip as _clip
from bitgrain.solvers import gptq as _gptq
from bitgrain.solvers import hqq as _hqq
from bitgrain.solvers import least_squares as _least_squares
from bitgrain.solvers import obq as _obq
from bitgrain.solvers import rtn as _rtn
from bitgrain.solvers import spqr as _spqr
from bitgrain.solvers.base import Moments, Solution, Solver, get_solver, register_solver, solver_names

__all__ = ["Moments", "Solution", "Solver", "get_solver", "register_solver", "solver_names"]

_ = _clip, _gptq, _hqq, _least_squares, _obq, _rtn, _spqr  # imported so that they register themselves
