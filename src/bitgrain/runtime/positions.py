"""What a model gives its layers for the position of one new token: its own module's numbers, computed ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.kernels.decoder import Turned, address_positions
from bitgrain.runtime.block_plan import AttentionPlan
from bitgrain.runtime.fused_block import fit

SPAN = 64
"""Positions that are computed at a time: few enough for torch to do it in one thread, as it does for one position."""
_MOST_SPANS = 256
"""That are kept."""

Pair = tuple[Tensor, Tensor]


class Positions:
    """cos and sin by `rotary`, called with hidden states and positions, for layers with such attention.

    Of modules whose numbers may depend on what was asked before (dynamic scaling), or are not transformers', nothing is
    computed ahead; nor if a position alone has other bits than among others.
    """

    def __init__(self, rotary: nn.Module, attention: AttentionPlan) -> None:
        self._rotary, self._attention = rotary, attention
        kind = getattr(rotary, "rope_type", "dynamic")
        self._ahead = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
        self._spans: dict[tuple[int, torch.dtype], tuple[Pair, Turned]] = {}

    def of(self, x: Tensor, position_ids: Tensor | None, past: int) -> tuple[Pair, Turned] | None:
        """For one token of each sequence, x [batch, 1, hidden]: tensors to be kept, and where the numbers are in them.
        None where positions are not [batch or 1, 1], or the layers cannot have them.

        position_ids  None: the position behind `past` others
        """
        place = past
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[1] != 1 or len(position_ids) not in (1, len(x)):
                return None
            wanted = position_ids.tolist()
            place = wanted[0][0]
            if not self._ahead or (len(wanted) > 1 and any(one[0] != place for one in wanted)):
                return self._alone(x, position_ids)
        first = place // SPAN * SPAN
        found = self._spans.get((first, x.dtype))
        if found is None:
            alone = self._alone(x, torch.tensor([[place]]))
            if not self._ahead or alone is None:
                return alone
            span = self._compute(x, torch.arange(first, first + SPAN)[None])
            if not all(a[:, place - first].equal(b[:, 0]) for a, b in zip(span, alone[0], strict=True)):
                self._ahead = False
                return alone
            if len(self._spans) == _MOST_SPANS:
                self._spans.clear()
            found = self._spans[first, x.dtype] = span, address_positions(*span)
        pair, (cos, sin, dtype, _, size) = found
        step = (place - first) * size * pair[0].itemsize
        return pair, (cos + step, sin + step, dtype, 1, size)

    def _alone(self, x: Tensor, position_ids: Tensor) -> tuple[Pair, Turned] | None:
        pair = self._compute(x, position_ids)
        return (pair, address_positions(*pair)) if fit(x, *pair, self._attention) else None

    def _compute(self, x: Tensor, position_ids: Tensor) -> Pair:
        cos, sin = type(self._rotary).forward(self._rotary, x, position_ids)
        return cos.contiguous(), sin.contiguous()
