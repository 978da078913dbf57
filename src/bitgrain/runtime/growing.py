"""Room for more tokens behind the keys and values of transformers' own cache layers, so that none is copied twice.

A `DynamicLayer` joins old and new tokens into a new tensor at every step. Here its `keys` and `values` become views
of memory with room behind them; to everybody else the layer is as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_STEP = 256
_NAME = "_bitgrain_room"


class _Room:
    """Memory [batch, heads, capacity, size] of keys and of values, of which the first `used` tokens are taken."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.keys, self.values, self.used = keys, values, used


def grow(layer: DynamicLayer, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, int] | None:
    """Make room for keys and values of `shape` [batch, heads, tokens, size] behind those of the layer.

    Returns keys and values with the new tokens, which are to be written, and how many stand before them. The layer has
    them from now on. None where what the layer holds does not fit.
    """
    batch, heads, tokens, size = shape
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys is None or values is None or keys.numel() == 0:
        like = torch.empty(shape, dtype=dtype)
        if not layer.is_initialized:
            layer.lazy_initialization(like, like)
        keys = values = torch.empty(batch, heads, 0, size, dtype=dtype)
    if (keys.shape[0], keys.shape[1], keys.shape[3]) != (batch, heads, size) or values.shape != keys.shape:
        return None
    if keys.dtype != dtype or values.dtype != dtype or keys.device.type != "cpu":
        return None
    past = keys.shape[2]
    room: Any = getattr(layer, _NAME, None)
    # in use by nobody else: another cache that shares this memory (a shallow copy, one that was cropped) has moved
    # `used` on, and tensors of before have been replaced
    if not (
        isinstance(room, _Room)
        and room.used == past
        and past + tokens <= room.keys.shape[2]
        and keys.data_ptr() == room.keys.data_ptr()
        and values.data_ptr() == room.values.data_ptr()
        and keys.stride() == room.keys.stride()
    ):
        capacity = (past + tokens + past // 2 + _STEP) // _STEP * _STEP
        room = _Room(*(old.new_empty(batch, heads, capacity, size) for old in (keys, values)), past)
        room.keys[:, :, :past].copy_(keys)
        room.values[:, :, :past].copy_(values)
        setattr(layer, _NAME, room)
    room.used = past + tokens
    layer.keys, layer.values = room.keys[:, :, : past + tokens], room.values[:, :, : past + tokens]
    return layer.keys, layer.values, past
