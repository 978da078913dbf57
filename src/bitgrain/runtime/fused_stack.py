"""All decoder layers of a model in one native call, where nothing happens between them.

The model still calls each of its layers. The first one computes all, and the others hand on what they are given as
long as it is that result. `models.fused_blocks` proves beforehand that the model does nothing else in between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor

from bitgrain.kernels.decoder import DecoderBlock, DecoderStack, Turned, address_positions
from bitgrain.runtime.block_caches import all_with_room, kind_of, places_with_room

if TYPE_CHECKING:
    from bitgrain.runtime.fused_block import FusedForward


class FusedStack:
    """forwards: of all layers that a model runs, in their order; the layers own them, and they own this.

    Only between `enter` and `leave`: who calls the layers by hand gets each one's own result. A copy of the model runs
    its layers one by one.
    """

    def __init__(self, forwards: Sequence[FusedForward]) -> None:
        self._forwards = [ref(one) for one in forwards]
        self._native: DecoderStack | None = None
        self._running = threading.local()
        for place, one in enumerate(forwards):
            one.stack, one.place = self, place

    def remove(self) -> None:
        """Let the layers run one by one again."""
        for forward in self.forwards():
            forward.stack = None

    def forwards(self) -> Iterable[FusedForward]:
        """Those that there still are."""
        return [forward for one in self._forwards if (forward := one()) is not None]

    def enter(self) -> None:
        """The model is called, in this thread."""
        self._running.inside = True

    def leave(self) -> None:
        """It is done."""
        self._running.inside, self._running.result = False, None

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
        if not self.is_whole(x):
            return None
        y = self.compute(
            x, address_positions(cos, sin), [cache.layers[one.plan.attention.layer] for one in self.forwards()]
        )
        if y is None:
            return None
        self._running.result, self._running.next = y, 1
        return y

    def is_whole(self, x: Tensor) -> bool:
        """Whether nobody would notice that all layers ran in one call, for inputs like x; `compute` may run then."""
        blocks: list[DecoderBlock] = []
        for one in self._forwards:
            forward = one()
            block = None if forward is None else forward.whole(x)
            if block is None:
                return False
            blocks.append(block)
        if self._native is None or blocks != self._native.blocks:
            self._native = DecoderStack(blocks)
        return True

    def compute(self, x: Tensor, turned: Turned, layers: Sequence[Any]) -> Tensor | None:
        """The same behind the tokens of layers of a cache, one for each layer. None where they cannot have it."""
        native = self._native
        assert native is not None
        places = places_with_room(layers, x, native.heads)
        if places is not None:
            return native.run_at(x, turned, places)
        parts = [block.attention for block in native.blocks]
        kinds = {kind_of(layer, x, part) for layer, part in zip(layers, parts, strict=True)}
        if len(kinds) != 1 or None in kinds:
            return None
        return native.run(x, turned, all_with_room(layers, x, parts))
