"""A transform as a recipe lists it: its settings, when it is wanted, and whether the model may refuse it.

transforms:
  - {name: rotate, when: integer_inputs, optional: true}
  - {name: balance, pairs: linear, when: integer_inputs}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat
from bitgrain.recipes.scheme import Scheme
from bitgrain.transforms import Transform, get_transform

WHEN = ("always", "inputs", "integer_inputs", "int8_inputs", "int4_inputs")


@dataclass(frozen=True)
class Step:
    """`when`      "inputs": only if some layer's inputs are quantized; "integer_inputs": to integers; "int4_inputs": to
                integers, some of fewer than 8 bits; "int8_inputs": to integers, none of fewer
    `optional`  left out, with a note, where the model's structure does not allow it; else that is an error
    """

    name: str
    transform: Transform
    when: str = "always"
    optional: bool = False

    @property
    def online(self) -> bool:
        """Whether it leaves something to be computed at run time."""
        return bool(getattr(self.transform, "r4", False))

    def wanted(self, schemes: Iterable[Scheme | None]) -> bool:
        """Whether a model with these schemes of its layers gets the transform."""
        inputs = [scheme.input for scheme in schemes if scheme is not None and scheme.input is not None]
        bits = [spec.format.bits for spec in inputs if isinstance(spec.format, IntFormat)]
        if self.when == "integer_inputs":
            return bool(bits)
        if self.when in ("int8_inputs", "int4_inputs"):
            return bool(bits) and (min(bits) < 8) == (self.when == "int4_inputs")
        return self.when == "always" or bool(inputs)


def read_step(choice: str | Mapping[str, Any]) -> Step:
    """From a name, or {"name": ..., "when": ..., "optional": ..., setting: value, ...}. Raises SchemeError."""
    settings: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    when, optional = settings.pop("when", "always"), settings.pop("optional", False)
    if when not in WHEN:
        raise SchemeError(f"a transform's `when` is one of {', '.join(WHEN)}, not {when!r}")
    if not isinstance(optional, bool):
        raise SchemeError(f"a transform's `optional` is true or false, not {optional!r}")
    return Step(str(settings.get("name")), get_transform(settings), when, optional)
