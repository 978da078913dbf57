"""What a model gives its layers for the position of one new token: its own module's numbers, computed ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPAN = 64
"""Positions that are computed at a time: few enough for torch to do it in one thread, as it does for one position."""
_MOST_SPANS = 256
"""That are kept."""

Turned = tuple[Tensor, Tensor]


class Positions:
    """cos and sin [1, 1, size] by `rotary`, called with hidden states and positions.

    Of modules whose numbers may depend on what was asked before (dynamic scaling), or are not transformers', nothing is
    computed ahead; nor if a position alone has other bits than among others.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        kind = getattr(rotary, "rope_type", "dynamic")
        self._ahead = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
        self._spans: dict[tuple[int, torch.dtype], Turned] = {}

    def of(self, x: Tensor, position_ids: Tensor | None, past: int) -> Turned | None:
        """For one token of each sequence, x [batch, 1, hidden]; position_ids None: the one behind `past` others. None
        where they are not [batch or 1, 1]."""
        place = past
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[1] != 1 or len(position_ids) not in (1, len(x)):
                return None
            wanted = position_ids.tolist()
            place = wanted[0][0]
            if not self._ahead or any(one[0] != place for one in wanted):
                return self._compute(x, position_ids)
        first = place // SPAN * SPAN
        span = self._spans.get((first, x.dtype))
        if span is None:
            alone = self._compute(x, torch.tensor([[place]]))
            if not self._ahead:
                return alone
            span = self._compute(x, torch.arange(first, first + SPAN)[None])
            if not all(a[:, place - first].equal(b[:, 0]) for a, b in zip(span, alone, strict=True)):
                self._ahead = False
                return alone
            if len(self._spans) == _MOST_SPANS:
                self._spans.clear()
            self._spans[first, x.dtype] = span
        return span[0].narrow(1, place - first, 1), span[1].narrow(1, place - first, 1)

    def _compute(self, x: Tensor, position_ids: Tensor) -> Turned:
        cos, sin = type(self._rotary).forward(self._rotary, x, position_ids)
        return cos, sin
