"""Two sets of logits for the same tokens: how far apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD_TOLERANCE = 1e-3
"""Largest difference, relative to the standard deviation of the logits."""
KL_TOLERANCE = 1e-4
"""Nats a token, mean: either of the two is enough."""
ROUNDED_TOLERANCE = 2e-3
"""The same for engines that round inputs to 8 bits: llama.cpp was measured at up to 4e-4 (k-quants), 1e-3 (ternary)."""


@dataclass(frozen=True)
class Apart:
    """largest  difference, in standard deviations of ours; kl: of ours from theirs, nats a token, mean."""

    largest: float
    kl: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor) -> Apart:
        """Both float [texts, tokens, vocabulary]; what engines add to the vocabulary as padding does not count."""
        theirs = theirs[..., : ours.shape[-1]]
        if theirs.shape != ours.shape:
            return Apart(float("inf"), float("inf"))
        ours, theirs = ours.double(), theirs.double()
        largest = float((ours - theirs).abs().max() / ours.std())
        log_p, log_q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
        return Apart(largest, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))

    def equal(self, rounded: bool = False) -> bool:
        """Within either tolerance; of an engine that rounds inputs itself, within what that gives."""
        return self.largest <= SPREAD_TOLERANCE or self.kl <= (ROUNDED_TOLERANCE if rounded else KL_TOLERANCE)

    def __str__(self) -> str:
        return f"largest difference {self.largest:.2g} of the logits' spread, KL {self.kl:.2g}"
