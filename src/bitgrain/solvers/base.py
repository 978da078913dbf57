"""What a Solver is, and the registry in which a name finds one.

A Solver picks the codes of one weight matrix. A new one is one file: a frozen dataclass whose fields are the method's
settings, with `@register_solver("name")`, imported in this package's `__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec


@dataclass(frozen=True)
class Moments:
    """What calibration knows of the inputs x of one linear layer; all are means over the tokens, float32.

    hessian      [in, in]: x x^T, with x as the quantized layer will see it (half the Hessian of its squared error)
    tokens       how many tokens were seen; 0 for an expert that none was routed to
    cross        [in, in]: x_full x^T, the inputs of the full-precision model against x (GPTAQ, arXiv 2504.02692)
    residual     [out, in]: r x^T, r being what the residual stream lacks of the full-precision model's at that place
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    residual: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """[in]: mean of x^2, the weight of each input channel in range searches."""
        return self.hessian.diagonal()


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    method   the name of what produced the codes ("gptq", or "rtn" where that was the better)
    figures  numbers for the manifest, for instance {"damping": 0.01, "loss": 1.2e-3}
    notes    what was handled on the way and the user should know ("3 input channels are always zero")
    """

    q: QTensor
    method: str
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    """(W, spec, what is known of the inputs) -> QTensor. Implementations are stateless and deterministic."""

    needs_calibration: bool
    """Whether `moments` must be given."""

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """Codes for `weight` [out_features, in_features] (any float dtype) under `spec`.

        moments      of the layer's inputs; solvers that do not need them may use their importance
        outer_scale  for nested scales: the shared scale of the scales, stored
        Raises NumericsError (NaN, Inf, scale overflow; names the tensor).
        """
        ...


def required(moments: Moments | None, solver: str, name: str) -> Moments:
    """`moments`, for a solver that cannot do without. Raises SchemeError where there are none."""
    if moments is None:
        raise SchemeError(f"{name}: {solver} needs the second moments of the layer's inputs; calibrate first")
    return moments


_SOLVERS: dict[str, Callable[..., Solver]] = {}


def register_solver(name: str) -> Callable[[type], type]:
    """Class decorator: makes a solver available under `name` in recipes and on the command line."""

    def add(cls: type) -> type:
        _SOLVERS[name] = cls
        return cls

    return add


def solver_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_SOLVERS)


def get_solver(choice: str | Mapping[str, Any]) -> Solver:
    """The solver called `choice` (case-insensitive), or {"name": ..., setting: value, ...}.

    Raises SchemeError for an unknown name, an unknown setting, or a setting of the wrong type, listing what there is.
    """
    settings: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("name", None)
    maker = _SOLVERS.get(name.lower()) if isinstance(name, str) else None
    if maker is None:
        raise SchemeError(f"unknown solver {name!r}; known solvers: {', '.join(solver_names())}")
    return make_with_settings(maker, settings, f"solver {name!r}")


def make_with_settings(maker: Callable[..., Any], settings: Mapping[str, Any], what: str) -> Any:
    """A dataclass from its settings as a YAML file gives them.

    Raises SchemeError for a setting that it does not have, or whose type is not that of the default.
    """
    known = {f.name: f for f in fields(maker)} if hasattr(maker, "__dataclass_fields__") else {}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise SchemeError(f"{what} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
        given[key] = _typed(value, known[key].default, f"{what}: {key}")
    return maker(**given)


def _typed(value: Any, default: Any, what: str) -> Any:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(_typed(one, default[0] if default else one, f"{what}, one of them") for one in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None and type(value) is not type(default):
        raise SchemeError(f"{what} is a {type(default).__name__}, not {value!r}")
    return value
