"""Norm gains folded into the matrices that read the norm: the activations between them lose the gain's outliers.

diag(g) is moved:   W (g * n(x))  =  (W diag(g)) n(x)          (QuaRot, arXiv 2404.00456, section 4, stage 1a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.proof import check_same, routes
from bitgrain.transforms.rescale import reader_of, rescale


@register_transform("fold_norms")
@dataclass(frozen=True)
class FoldNorms:
    """Every norm whose readers are known gets the gain 1. Norms that nothing may be folded into stay."""

    whole_model: ClassVar[bool] = True

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Folds the final norm into lm_head, unless the head shares its weight with the embeddings."""
        before = view.run()
        fold(view.module, view.stream.norms)
        figures: dict[str, Any] = {"folded": len(view.stream.norms)}
        if view.stream.doubt:
            figures["note"] = view.stream.doubt
        return {**figures, "difference": check_same(before, view.run(), "the model", "folding the final norm")}

    def apply(self, block: BlockView) -> dict[str, Any]:
        norms = [pair for pair in block.pairs if pair.kind == "norm"]
        before, routed, largest = block.run(0), routes(block.module), 0.0
        for pair in norms:
            fold(block.module, [pair])
            difference = check_same(before, block.run(0), block.path, f"folding {pair}", routed)
            largest = max(largest, difference)
        return {"folded": len(norms), "difference": largest}


@torch.no_grad()
def fold(module: nn.Module, norms: list[Pair] | tuple[Pair, ...]) -> None:
    """Gains become 1, in place. A channel whose gain is 0 but whose bias is not keeps both."""
    for pair in norms:
        gain = module.get_parameter(pair.gain).data
        factors = gain + pair.offset
        zero = factors == 0
        rescale(module, pair, torch.where(zero, 1.0, factors))
        if bool(zero.any()) and not pair.bias:
            gain[zero] = 1.0 - pair.offset
            for name in pair.readers:
                reader_of(module, pair, name)[..., zero] = 0.0
