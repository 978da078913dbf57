"""How a tile's range is chosen: one file each, and `get_range` to find them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from bitgrain.errors import SchemeError
from bitgrain.numerics.ranges.base import Range, scale_from_limits
from bitgrain.numerics.ranges.kl import KL
from bitgrain.numerics.ranges.minmax import MinMax
from bitgrain.numerics.ranges.moving_average import MovingAverage
from bitgrain.numerics.ranges.mse import MSE
from bitgrain.numerics.ranges.output_search import OutputSearch
from bitgrain.numerics.ranges.percentile import Percentile
from bitgrain.numerics.ranges.weighted import Weighted

RANGES: dict[str, type[Range]] = {
    range_type.name: range_type for range_type in (MinMax, MovingAverage, Percentile, MSE, KL, Weighted, OutputSearch)
}


def get_range(choice: str | Range | Mapping[str, object]) -> Range:
    """A range from its name ("mse"), or from a mapping with its settings ({"name": "mse", "norm": 2.4}).

    Raises SchemeError for an unknown name, an unknown setting or a setting that is not a number, listing what there is.
    """
    if isinstance(choice, Range):
        return choice
    settings: dict[str, object] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("name", None)
    range_type = RANGES.get(name.lower()) if isinstance(name, str) else None
    if range_type is None:
        raise SchemeError(f"unknown range {name!r}; known ranges: {', '.join(RANGES)}")
    known = {f.name: f.type for f in fields(range_type)}  # type: ignore[arg-type]
    for key, value in settings.items():
        if key not in known:
            raise SchemeError(f"range {name!r} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int if known[key] == "int" else (int, float)):
            raise SchemeError(f"range {name!r}: {key} is a {known[key]}, not {value!r}")
    return range_type(**settings)


__all__ = [
    "KL",
    "MSE",
    "RANGES",
    "MinMax",
    "MovingAverage",
    "OutputSearch",
    "Percentile",
    "Range",
    "Weighted",
    "get_range",
    "scale_from_limits",
]
