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


class Lent:
    """Tokens that several rooms hold since a lease of them was made, and have not noted."""

    def __init__(self) -> None:
        self.tokens = 0


class Room:
    """Memory [b, h, capacity, d] of which tokens start..stop are in use; or another tensor that is held instead."""

    changes = 0
    """Of all rooms, but for tokens that are lent."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.start = self.capacity = self._stop = 0
        self.kind: tuple[Any, ...] = ()
        """(b, h, d, dtype) of the memory."""
        self.place: tuple[int, int, int] = (0, 0, 0)
        """Address of its first token, strides of b and h."""
        self._held: Tensor | None = None
        self._lent: Lent | None = None
        self.inference = False
        Room.changes += 1

    def __getstate__(self) -> tuple[Tensor | None, int, int]:
        memory = self._held if self.memory is None else self.memory
        return memory, self.start, -1 if self.memory is None else self.stop

    def __setstate__(self, state: tuple[Tensor | None, int, int]) -> None:
        self.__init__()
        memory, start, stop = state
        if stop < 0:
            self._held = memory
        else:
            self.memory, self.start, self._stop = memory, start, stop
            self._found()

    @property
    def stop(self) -> int:
        return self._stop if self._lent is None else self._stop + self._lent.tokens

    @property
    def held(self) -> Tensor | None:
        """What is held: a view, made when it is asked for."""
        if self.memory is None:
            return self._held
        if self._held is None or self._held.shape[2] != self.tokens:
            self._held = self.memory.narrow(2, self.start, self.tokens)
        return self._held

    def hold(self, x: Tensor | None) -> None:
        """Hold another tensor, until tokens are added to it."""
        self._change()
        self.memory, self._held, self.capacity = None, x, 0

    @property
    def tokens(self) -> int:
        if self.memory is not None:
            return self.stop - self.start
        return 0 if self._held is None or self._held.numel() == 0 else self._held.shape[2]

    def append(self, x: Tensor, write: bool) -> None:
        """Hold x too, behind the others. write False: only room of its shape, which somebody else fills."""
        used, more = self.tokens, x.shape[2]
        if torch.is_grad_enabled():
            held = self.held
            assert held is not None
            if x.requires_grad or held.requires_grad:
                self.hold(torch.cat([held, x], dim=2))
                return
        memory = self.memory
        if memory is None or not self.has_room(more):
            capacity = max(_LEAST, (used + more) + (used + more) // 2)
            memory, held = x.new_empty(*x.shape[:2], capacity, x.shape[3]), self.held
            if used:
                assert held is not None
                memory[:, :, :used] = held
            self._change()
            self.memory, self.start, self._stop = memory, 0, used
            self._found()
        if write:
            memory[:, :, self.stop : self.stop + more] = x
        self.extend(more)

    def has_room(self, count: int) -> bool:
        """For so many tokens more, behind those that are held."""
        fits = self.stop + count <= self.capacity
        return fits and not (self.inference and not torch.is_inference_mode_enabled())

    def extend(self, count: int) -> None:
        """Hold so many tokens more, for which there is room."""
        self._change()
        self._stop += count

    def lend(self, lent: Lent) -> None:
        """Hold what is added to `lent` too, as long as nothing else changes."""
        if self._lent is not None:
            self._change()
        self._lent = lent

    def cut(self, first: int, last: int) -> None:
        """Hold tokens first..last of what is held."""
        self._change()
        if self.memory is None:
            self._held = None if self._held is None else self._held[:, :, first:last]
            return
        self.start, self._stop = self.start + first, self.start + last
        self._found()

    def _change(self) -> None:
        """Before anything is changed: take note of tokens that were added by a lease, and end it."""
        self._stop, self._lent = self.stop, None
        Room.changes += 1

    def _found(self) -> None:
        """Note what the memory is like."""
        assert self.memory is not None
        (batch, heads, self.capacity, size), (a, b, _, _) = self.memory.shape, self.memory.stride()
        self.kind, self.inference, self._held = (
            (batch, heads, size, self.memory.dtype), self.memory.is_inference(), None,
        )  # fmt: skip
        self.place = self.memory.data_ptr() + self.start * size * self.memory.itemsize, a, b


class GrowingLayer(DynamicLayer):
    """In place of transformers' DynamicLayer. What it returns is overwritten only after `crop`."""

    def __init__(self) -> None:
        self.rooms = (Room(), Room())
        self.lease: Any = None
        """What the first layer of a cache keeps for `runtime.block_caches`."""
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lease": None}

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, tokens, size]."""
        return self.rooms[0].held

    @keys.setter
    def keys(self, x: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.rooms[0].hold(x)

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[batch, heads, tokens, size]."""
        return self.rooms[1].held

    @values.setter
    def values(self, x: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.rooms[1].hold(x)

    def get_seq_length(self) -> int:
        return self.rooms[0].tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, tokens, size]; returns views of all. write=False: only their room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write = bool(kwargs.get("write", True))
        for room, x in zip(self.rooms, (key_states, value_states), strict=True):
            room.append(x, write)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        held = self.rooms[0].tokens
        if tokens_to_remove and held:
            self._cut(0, max(0, held + tokens_to_remove))

    def _cut(self, first: int, last: int) -> None:
        for room in self.rooms:
            room.cut(first, last)


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
        tokens = self.rooms[0].tokens
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
