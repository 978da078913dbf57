"""Layers of a cache that a native decoder block reads and writes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bitgrain.kernels.decoder import AttentionPart
from bitgrain.kernels.decoder_caches import BlockCache, DenseCache, PackedCache
from bitgrain.runtime.kv_cache.growing import GrowingLayer
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


def places_with_room(layers: Sequence[Any], x: Tensor, heads: Sequence[tuple[int, int]]) -> list[int] | None:
    """As native code is told of plain layers that have room for the tokens of x, and hold them from now on; None, and
    nothing is changed, where one has none yet.

    heads: of each layer, and their size
    """
    (batch, new, _), dtype = x.shape, x.dtype
    places: list[int] = []
    for layer, (count, size) in zip(layers, heads, strict=True):
        if type(layer) is not GrowingLayer:
            return None
        keys, values = layer.rooms
        if not keys.has_room(new) or not values.has_room(new) or keys.tokens != values.tokens:
            return None
        if keys.kind != (batch, count, size, dtype) or values.kind != keys.kind:
            return None
        (k, k_batch, k_head), (v, v_batch, v_head) = keys.place, values.place
        places += (0, keys.stop - keys.start + new, k, v, k_batch, k_head, v_batch, v_head)
    for layer in layers:
        for room in layer.rooms:
            room.extend(new)
    return places
