"""Layers of a cache that a native decoder block reads and writes by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitgrain.kernels.decoder import AttentionPart, BlockCache, DenseCache, PackedCache
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
    if isinstance(layer, GrowingLayer):
        new = x.new_empty(x.shape[0], part.kv_heads, x.shape[1], part.head_dim)
        return DenseCache(*layer.update(new, new, write=False))
    return PackedCache(layer.held_keys.packed, layer.held_values.packed, x.shape[1])
