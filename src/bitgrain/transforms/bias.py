"""Biases of norms and of v moved into the biases of what reads them: the activations between lose a constant part.

    W (n + b) + c  =  W n + (c + W b)         (bias absorption, Nagel et al., arXiv 1906.04721, section 4.1.3)

No parameter is added: where a reader has no bias, nothing is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.proof import TOLERANCE, check_same, difference, routes
from bitgrain.transforms.rescale import bias_of, reader_of, to_columns, writer_rows


@register_transform("absorb_bias")
@dataclass(frozen=True)
class AbsorbBias:
    """Biases of norms, and of v (whose constant part attention, summing to 1, hands on as it is)."""

    whole_model: ClassVar[bool] = False

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Nothing: heads have no bias as a rule, and the final norm's output is not quantized."""
        del view
        return {}

    def apply(self, block: BlockView) -> dict[str, Any]:
        before, routed, largest = block.run(0), routes(block.module), 0.0
        absorbed: list[str] = []
        skipped: list[str] = []
        for pair in block.pairs:
            if not pair.bias or (pair.kind == "linear" and not pair.mixes):
                continue
            biases = {name: bias_of(block.module, name) for name in pair.readers}
            if not all(biases.values()):
                skipped.append(pair.bias)
                continue
            saved = {name: block.module.get_parameter(name).data.clone() for name in (pair.bias, *biases.values())}
            absorb(block.module, pair, biases)
            moved = difference(before, block.run(0), routed)
            if pair.kind == "linear" and not moved <= TOLERANCE:  # attention that does not sum to 1 (sinks, gates)
                for name, value in saved.items():
                    block.module.get_parameter(name).data.copy_(value)
                skipped.append(pair.bias)
                continue
            largest = max(largest, check_same(before, block.run(0), block.path, f"absorbing {pair.bias}", routed))
            absorbed.append(pair.bias)
        return {"absorbed": absorbed, "skipped": skipped, "difference": largest}


@torch.no_grad()
def absorb(module: nn.Module, pair: Pair, biases: dict[str, str]) -> None:
    """Move the pair's bias into those of its readers (`biases`: reader -> its bias), in place."""
    own = module.get_parameter(pair.bias).data
    rows = writer_rows(pair, own.device) if pair.kind == "linear" else slice(None)
    moved = to_columns(pair, own[rows])
    for name, bias in biases.items():
        module.get_parameter(bias).data.add_(reader_of(module, pair, name) @ moved)
    own[rows] = 0.0
