"""A cache that keeps nothing and notes what it is given: for static scales of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from bitgrain.numerics.observers import State, merge, start, update
from bitgrain.runtime.kv_cache.schemes import CacheScheme


@dataclass(frozen=True)
class Observed:
    """What was seen of the keys and the values of one layer."""

    keys: State
    values: State

    def merged(self, other: Observed) -> Observed:
        """With what was seen elsewhere."""
        return Observed(merge(self.keys, other.keys), merge(self.values, other.values))


class ObservingCache(DynamicCache):
    """Always empty: a model runs with it as without any. What is given is noted while `watching`.

    seen  by layer of the cache
    """

    def __init__(self, scheme: CacheScheme, config: Any) -> None:
        super().__init__(config=config)
        self.scheme = scheme
        self.watching = False
        self.seen: dict[int, Observed] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Gives back what it is given. Raises NumericsError for NaN and Inf."""
        if self.watching:
            keys, values = self.scheme.keys, self.scheme.values
            before = self.seen.get(layer_idx) or Observed(start(keys.range), start(values.range))
            self.seen[layer_idx] = Observed(
                update(before.keys, key_states, f"keys of layer {layer_idx}"),
                update(before.values, value_states, f"values of layer {layer_idx}"),
            )
        return key_states, value_states
