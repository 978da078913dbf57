"""What a Solver is, and the registry in which a name finds one.

A Solver picks the codes of one weight matrix. A new one is one file: a class with `@register_solver("name")`, imported
in this package's `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec


class Solver(Protocol):
    """(W, spec, what is known of the inputs) -> QTensor. Implementations are stateless and deterministic."""

    needs_calibration: bool
    """Whether `hessian` must be given."""

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        *,
        hessian: Tensor | None = None,
        importance: Tensor | None = None,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> QTensor:
        """Codes for `weight` [out_features, in_features] (any float dtype) under `spec`.

        hessian      float32 [in, in]: sum of x x^T over the calibration inputs
        importance   float32 [in]: weight of each input channel in range searches
        outer_scale  for nested scales: the shared scale of the scales, stored
        Raises NumericsError (NaN, Inf, scale overflow; names the tensor).
        """
        ...


_SOLVERS: dict[str, Callable[[], Solver]] = {}


def register_solver(name: str) -> Callable[[type], type]:
    """Class decorator: makes a solver available under `name` in recipes and on the command line."""

    def add(cls: type) -> type:
        _SOLVERS[name] = cls
        return cls

    return add


def solver_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_SOLVERS)


def get_solver(name: str) -> Solver:
    """The solver called `name` (case-insensitive). Raises SchemeError that lists all."""
    maker = _SOLVERS.get(name.lower())
    if maker is None:
        raise SchemeError(f"unknown solver {name!r}; known solvers: {', '.join(solver_names())}")
    return maker()
