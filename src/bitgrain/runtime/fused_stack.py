"""All decoder layers of a model in one native call, where nothing happens between them.

The model still calls each of its layers. The first one computes all, and the others hand on what they are given as
long as it is that result. `models.fused_blocks` proves beforehand that the model does nothing else in between.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn

from bitgrain.kernels.decoder import DecoderBlock, DecoderStack
from bitgrain.runtime.block_caches import all_with_room, kind_of

if TYPE_CHECKING:
    from bitgrain.runtime.fused_block import FusedForward


class FusedStack:
    """forwards: of all layers that `model` runs, in their order; the layers own them, and they own this.

    Only inside a call of `model`: who calls the layers by hand gets each one's own result. A copy of the model runs its
    layers one by one.
    """

    def __init__(self, model: nn.Module, forwards: Sequence[FusedForward]) -> None:
        self._forwards = [ref(one) for one in forwards]
        self._native: DecoderStack | None = None
        self._running = threading.local()
        inside = _Inside(self._running)
        self._hooks = [
            model.register_forward_pre_hook(inside.enter),
            model.register_forward_hook(inside.leave, always_call=True),
        ]
        for place, one in enumerate(forwards):
            one.stack, one.place = self, place

    def remove(self) -> None:
        """Let the layers run one by one again."""
        for hook in self._hooks:
            hook.remove()
        for one in self._forwards:
            if (forward := one()) is not None:
                forward.stack = None

    def hand_on(self, place: int, x: Tensor) -> bool:
        """Whether x is the result of all layers already, on its way through those behind the first."""
        running = self._running
        if getattr(running, "result", None) is not x or running.next != place:
            return False
        running.next += 1
        if running.next == len(self._forwards):
            running.result = None
        return True

    def run(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Any, config: Any) -> Tensor | None:
        """The result of all layers for new tokens without a mask; None where they must run one by one."""
        if not getattr(self._running, "inside", False) or config.num_hidden_layers != len(self._forwards):
            return None
        layers: list[Any] = []
        blocks: list[DecoderBlock] = []
        for one in self._forwards:
            forward = one()
            block = None if forward is None else forward.whole(x)
            if forward is None or block is None:
                return None
            layers.append(cache.layers[forward.plan.attention.layer])
            blocks.append(block)
        parts = [block.attention for block in blocks]
        kinds = {kind_of(layer, x, part) for layer, part in zip(layers, parts, strict=True)}
        if len(kinds) != 1 or None in kinds:
            return None
        if self._native is None or blocks != self._native.blocks:
            self._native = DecoderStack(blocks)
        y = self._native.run(x, cos, sin, all_with_room(layers, x, parts))
        if y is None:
            return None
        self._running.result, self._running.next = y, 1
        return y


class _Inside:
    """Notes whether a model is being called, for each thread; a copy of it notes nothing that anybody asks for."""

    def __init__(self, running: threading.local) -> None:
        self._running = running

    def __reduce__(self) -> Any:
        return _Inside._nobody, ()

    @staticmethod
    def _nobody() -> _Inside:
        return _Inside(threading.local())

    def enter(self, *_: Any) -> None:
        self._running.inside = True

    def leave(self, *_: Any) -> None:
        self._running.inside, self._running.result = False, None
