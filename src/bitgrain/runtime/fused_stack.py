"""All decoder layers of a model in one native call, where nothing happens between them.

The model still calls each of its layers. The first one computes all, and the others hand on what they are given as
long as it is that result. `models.fused_blocks` proves beforehand that the model does nothing else in between.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor

from bitgrain.kernels.decoder import DecoderStack
from bitgrain.runtime.kv_cache.growing import GrowingLayer

if TYPE_CHECKING:
    from bitgrain.runtime.fused_block import FusedForward


class FusedStack:
    """forwards: of all layers of a model, in their order; the layers own them, and they own this."""

    def __init__(self, forwards: Sequence[FusedForward]) -> None:
        self._forwards = [ref(one) for one in forwards]
        self._native: DecoderStack | None = None
        self._blocks: list[Any] = []
        self._local = threading.local()
        for place, one in enumerate(forwards):
            one.stack, one.place = self, place

    def hand_on(self, place: int, x: Tensor) -> bool:
        """Whether x is the result of all layers already, on its way through those behind the first."""
        local = self._local
        if getattr(local, "result", None) is not x or local.next != place:
            return False
        local.next += 1
        if local.next == len(self._forwards):
            local.result = None
        return True

    def run(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Any, config: Any) -> Tensor | None:
        """The result of all layers for new tokens without a mask; None where they must run one by one."""
        if config.num_hidden_layers != len(self._forwards):
            return None
        layers: list[GrowingLayer] = []
        blocks: list[Any] = []
        for one in self._forwards:
            forward = one()
            if forward is None or not forward.is_whole(x):
                return None
            layer = cache.layers[forward.plan.attention.layer]
            if not isinstance(layer, GrowingLayer) or (layer.keys is not None and layer.keys.dtype != x.dtype):
                return None
            layers.append(layer)
            blocks.append(forward.native())
        if self._native is None or blocks != self._blocks:
            self._native, self._blocks = DecoderStack(blocks), blocks
        kept: list[tuple[Tensor, Tensor]] = []
        for layer, block in zip(layers, blocks, strict=True):
            attention = block.attention
            new = x.new_empty(x.shape[0], attention.kv_heads, x.shape[1], attention.head_dim)
            kept.append(layer.update(new, new, write=False))
        y = self._native.run(x, cos, sin, kept)
        self._local.result, self._local.next = y, 1
        return y
