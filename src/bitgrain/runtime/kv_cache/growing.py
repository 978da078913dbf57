"""A plain cache whose memory grows ahead of its tokens: adding a token copies that token, not the whole past.

transformers' own layers concatenate at each step. Here keys and values are views into memory that is taken half as
large again whenever it is full, so that the copies made for n tokens are less than 3 n tokens in all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitgrain.runtime.kv_cache.sliding import SlidingWindow

_LEAST = 64
"""Tokens that memory is taken for at least."""


class _Room:
    """Memory [b, h, capacity, d] of which tokens start..stop are in use; `view` shows them."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.view: Tensor | None = None
        self.start = self.stop = 0

    def append(self, held: Tensor, x: Tensor, write: bool) -> Tensor:
        """held with x behind it. held: what the layer holds; another tensor than `view` where it was changed.

        write False: room of the shape of x, which somebody else fills
        """
        if torch.is_grad_enabled() and (x.requires_grad or held.requires_grad):
            return torch.cat([held, x], dim=2)
        used, more = (0 if held.numel() == 0 else held.shape[2]), x.shape[2]
        memory = self.memory
        fits = memory is not None and held is self.view and self.stop + more <= memory.shape[2]
        if memory is None or not fits or (memory.is_inference() and not torch.is_inference_mode_enabled()):
            capacity = max(_LEAST, (used + more) + (used + more) // 2)
            memory = x.new_empty(*x.shape[:2], capacity, x.shape[3])
            if used:
                memory[:, :, :used] = held
            self.memory, self.start, self.stop = memory, 0, used
        if write:
            memory[:, :, self.stop : self.stop + more] = x
        self.stop += more
        return self.show()

    def show(self) -> Tensor:
        assert self.memory is not None
        self.view = self.memory.narrow(2, self.start, self.stop - self.start)
        return self.view

    def cut(self, held: Tensor, first: int, last: int) -> Tensor:
        """Tokens first..last of what is held."""
        if held is not self.view:
            return held[:, :, first:last]
        self.start, self.stop = self.start + first, self.start + last
        return self.show()


class GrowingLayer(DynamicLayer):
    """In place of transformers' DynamicLayer. What it returns is overwritten only after `crop`."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms = (_Room(), _Room())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, tokens, size]; returns views of all. write=False: only their room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        write = bool(kwargs.get("write", True))
        self.keys = self._rooms[0].append(self.keys, key_states, write)
        self.values = self._rooms[1].append(self.values, value_states, write)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        if tokens_to_remove and self.get_seq_length():
            assert self.keys is not None
            self._cut(0, max(0, self.keys.shape[2] + tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self._rooms = (_Room(), _Room())

    def _cut(self, first: int, last: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._rooms[0].cut(self.keys, first, last)
        self.values = self._rooms[1].cut(self.values, first, last)


class GrowingSlidingLayer(SlidingWindow, GrowingLayer):
    """In place of DynamicSlidingWindowLayer: the window moves through the memory, then back to its start."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__()
        self._slide(sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[2]
        keys, values = super().update(key_states, value_states, **kwargs)
        seen = self.sliding_window - 1 + key_states.shape[2]
        if not self.record_past:
            self._shrink()
        return keys[:, :, -seen:], values[:, :, -seen:]

    def _shrink(self) -> None:
        if self.keys is None:
            return
        tokens = self.keys.shape[2]
        self._cut(max(0, tokens - self.sliding_window + 1), tokens)


class GrowingCache(DynamicCache):
    """A DynamicCache for the layers of a config; layers that keep something else than keys and values stay as they are.

    `use_cache(model, lambda: GrowingCache(config))` puts it under a model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = GrowingLayer()
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = GrowingSlidingLayer(layer.sliding_window)
