"""Layers of transformers' Cache that hold quantized keys and values: with a past of any length, and of a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from bitgrain.errors import ModelError, SchemeError
from bitgrain.kernels.attention import MOST_QUERIES
from bitgrain.runtime.kv_cache.held import Held
from bitgrain.runtime.kv_cache.past import Past
from bitgrain.runtime.kv_cache.schemes import CacheScheme, token_bits
from bitgrain.runtime.kv_cache.sliding import SlidingWindow
from bitgrain.runtime.kv_cache.tiled import Tiled, is_served


class QuantizedLayer(DynamicLayer):
    """In place of transformers' DynamicLayer. `scales`: (keys, values) [1, 1] float32 of a static scheme."""

    def __init__(self, scheme: CacheScheme, scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.scheme, self._scales = scheme, scales or (None, None)
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        scheme, (key, value) = self.scheme, self._scales
        self.held_keys: Held | Tiled = Held(scheme.keys, recent=scheme.recent, step=scheme.step, scale=key)
        self.held_values: Held | Tiled = Held(scheme.values, recent=scheme.recent, step=scheme.step, scale=value)

    @property
    def nbytes(self) -> int:
        """Of the keys and values that are held."""
        return self.held_keys.nbytes + self.held_values.nbytes

    @property
    def allocated(self) -> int:
        """The same with the memory that is taken for tokens to come."""
        return self.held_keys.allocated + self.held_values.allocated

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raises SchemeError for heads that the scheme's groups do not divide."""
        for states in (key_states, value_states):
            reason = self.scheme.indivisible(states.shape[-1])
            if reason:
                raise SchemeError(f"{reason}; use int8, int4 or int2")
        scheme = self.scheme
        alike = token_bits(scheme.keys) == token_bits(scheme.values)
        if alike and is_served(scheme.keys, key_states) and is_served(scheme.values, value_states):
            self.held_keys = Tiled(scheme.keys, key_states, values=False)
            self.held_values = Tiled(scheme.values, value_states, values=True)
        self.dtype, self.device = key_states.dtype, key_states.device
        # what transformers looks at: the dtype and device of keys and values that are not here
        self.keys = key_states.new_empty(key_states.shape[0], key_states.shape[1], 0, key_states.shape[-1])
        self.values = value_states.new_empty(value_states.shape[0], value_states.shape[1], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, tokens, size]; returns all, as `Held.append`, each as a `Past` where they
        are few and a kernel can read what is held.

        Raises ModelError for tokens of another shape than those that are held.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        held, given = ([*keys.shape[:2], keys.shape[-1]] for keys in (self.keys, key_states))
        if given != held:
            raise ModelError(
                f"this cache holds keys [batch, heads, size] {held} and is given {given}: it "
                "belongs to another model or batch; make a new one"
            )
        if isinstance(self.held_keys, Tiled) and isinstance(self.held_values, Tiled):
            self.held_keys.add(key_states)
            self.held_values.add(value_states)
            seen = self._seen(key_states.shape[2])
            if key_states.shape[2] <= MOST_QUERIES:
                return Past.of(self.held_keys, seen, key_states), Past.of(self.held_values, seen, value_states)
            return self.held_keys.newest(seen, key_states.dtype), self.held_values.newest(seen, value_states.dtype)
        keys, values = self.held_keys.append(key_states), self.held_values.append(value_states)
        seen = self._seen(key_states.shape[2])
        return keys[:, :, -seen:], values[:, :, -seen:]

    def _seen(self, count: int) -> int:
        """How many of the tokens that are held now a call with `count` new ones is shown."""
        return self.held_keys.tokens

    def get_seq_length(self) -> int:
        return self.held_keys.tokens

    def reset(self) -> None:
        self._hold_nothing()
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        for held in (self.held_keys, self.held_values):
            held.crop(min(-tokens_to_remove, held.tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self._for_batch(len(indices))
            self.held_keys.select(indices)
            self.held_values.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            assert self.keys is not None
            self._for_batch(repeats * self.keys.shape[0])
            self.held_keys.repeat(repeats)
            self.held_values.repeat(repeats)

    def offload(self) -> None:
        self.held_keys.to("cpu")
        self.held_values.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.held_keys.to(self.device)
            self.held_values.to(self.device)

    def _for_batch(self, batch: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys = self.keys.new_empty(batch, *self.keys.shape[1:])
        self.values = self.values.new_empty(batch, *self.values.shape[1:])


class QuantizedSlidingLayer(SlidingWindow, QuantizedLayer):
    """In place of DynamicSlidingWindowLayer: what the window has left is dropped, block by block."""

    def __init__(self, scheme: CacheScheme, sliding_window: int, scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(scheme, scales)
        self._slide(sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        found = super().update(key_states, value_states)
        if not self.record_past:
            self._shrink()
        return found

    def _seen(self, count: int) -> int:
        return min(self.held_keys.tokens, self.sliding_window - 1 + count)

    def _shrink(self) -> None:
        for held in (self.held_keys, self.held_values):
            held.drop_oldest(max(0, held.tokens - self.sliding_window + 1))
