"""Layers of a cache that a native decoder block reads and writes by itself."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.decoder import AttentionPart
from bitgrain.kernels.decoder_caches import BlockCache, DenseCache, PackedCache
from bitgrain.runtime.kv_cache.growing import GrowingLayer, Lent, Room
from bitgrain.runtime.kv_cache.layers import QuantizedLayer
from bitgrain.runtime.kv_cache.tiled import Tiled


def kind_of(layer: Any, x: Tensor, part: AttentionPart) -> type[BlockCache] | None:
    """What a block is given of a layer for inputs x [batch, tokens, hidden]; None where it cannot have it."""
    if isinstance(layer, GrowingLayer):
        return DenseCache if layer.keys is None or layer.keys.dtype == x.dtype else None
    if type(layer) is not QuantizedLayer or not isinstance(layer.held_keys, Tiled) or layer.dtype != x.dtype:
        return None
    packed = layer.held_keys.packed
    fits = (packed.batch, packed.heads, packed.size) == (x.shape[0], part.kv_heads, part.head_dim)
    return PackedCache if fits and isinstance(layer.held_values, Tiled) else None


def with_room(layer: Any, x: Tensor, part: AttentionPart) -> BlockCache:
    """A layer that has a kind, with room for the tokens of x."""
    return all_with_room([layer], x, [part])[0]


def all_with_room(layers: Sequence[Any], x: Tensor, parts: Sequence[AttentionPart]) -> list[BlockCache]:
    """The same of several."""
    like: dict[tuple[int, int], Tensor] = {}  # what new keys and values are like
    found: list[BlockCache] = []
    for layer, part in zip(layers, parts, strict=True):
        if isinstance(layer, GrowingLayer):
            shape = part.kv_heads, part.head_dim
            new = like.get(shape)
            if new is None:
                new = like[shape] = x.new_empty(x.shape[0], shape[0], x.shape[1], shape[1])
            found.append(DenseCache(*layer.update(new, new, write=False)))
        else:
            found.append(PackedCache(layer.held_keys.packed, layer.held_values.packed, x.shape[1]))
    return found


def places_with_room(layers: Sequence[Any], x: Tensor, heads: Sequence[tuple[int, int]]) -> array[int] | None:
    """As native code is told of plain layers that have room for the tokens of x, and hold them from now on; None, and
    nothing is changed, where one has none yet.

    heads: of each layer, and their size
    """
    if type(layers[0]) is not GrowingLayer:
        return None
    lease: Lease | None = layers[0].lease
    places = None if lease is None else lease.take(layers, x)
    if places is None:
        layers[0].lease = lease = Lease.of(layers, x, heads)
        places = None if lease is None else lease.take(layers, x)
    return places


class Lease:
    """Plain layers of a cache that were looked at: tokens are added to all of them without another look, as long as no
    plain cache anywhere is changed otherwise."""

    def __init__(self, layers: Sequence[GrowingLayer], x: Tensor, places: array[int]) -> None:
        rooms = [room for layer in layers for room in layer.rooms]
        self._layers = [id(layer) for layer in layers]  # the first of them owns this: it must not hold them
        self._shape, self._dtype, self._places, self._lent = x.shape[:2], x.dtype, places, Lent()
        self._stop, self._capacity = places[1], min(room.capacity - room.start for room in rooms)
        self._inference = any(room.inference for room in rooms)
        for room in rooms:
            room.lend(self._lent)
        self._changes = Room.changes

    @classmethod
    def of(cls, layers: Sequence[Any], x: Tensor, heads: Sequence[tuple[int, int]]) -> Lease | None:
        """None where they differ in tokens, are not plain, or do not fit x."""
        places: list[int] = []
        tokens = layers[0].rooms[0].tokens
        for layer, (count, size) in zip(layers, heads, strict=True):
            if type(layer) is not GrowingLayer:
                return None
            for room in layer.rooms:
                if room.kind != (x.shape[0], count, size, x.dtype) or room.memory is None or room.tokens != tokens:
                    return None
            (k, k_batch, k_head), (v, v_batch, v_head) = (room.place for room in layer.rooms)
            places += (0, tokens, k, v, k_batch, k_head, v_batch, v_head)
        return cls(layers, x, array("q", places))

    def take(self, layers: Sequence[Any], x: Tensor) -> array[int] | None:
        """See `places_with_room`."""
        stop = self._stop + x.shape[1]
        if self._changes != Room.changes or stop > self._capacity or x.shape[:2] != self._shape:
            return None
        if x.dtype != self._dtype or [id(layer) for layer in layers] != self._layers:
            return None
        if self._inference and not torch.is_inference_mode_enabled():
            return None
        self._stop = stop
        self._lent.tokens += x.shape[1]
        self._places[1::8] = array("q", (stop,)) * len(layers)
        return self._places
