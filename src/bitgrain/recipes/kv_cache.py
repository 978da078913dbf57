"""The KV cache that a recipe calibrates: a scheme's name, or {name: fp8, range: mse}."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitgrain.errors import SchemeError
from bitgrain.numerics.ranges import MovingAverage, get_range
from bitgrain.runtime.kv_cache.schemes import CacheScheme, get_cache_scheme


def read_cache(choice: str | Mapping[str, Any]) -> CacheScheme:
    """Raises SchemeError for an unknown scheme, key or range, and for a range that depends on the order of batches."""
    settings: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    scheme = get_cache_scheme(str(settings.pop("name", None)))
    range_ = settings.pop("range", None)
    if settings:
        raise SchemeError(f"kv_cache has no setting {next(iter(settings))!r}; it has: name, range")
    if range_ is None:
        return scheme
    chosen = get_range(range_)
    if isinstance(chosen, MovingAverage):
        raise SchemeError("kv_cache: batches are seen in parallel, so no moving average; use minmax, percentile or mse")
    return replace(scheme, keys=replace(scheme.keys, range=chosen), values=replace(scheme.values, range=chosen))
