"""SmoothQuant (Xiao et al., arXiv 2211.10438): outliers of the activations moved into the weights, channel by channel.

s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)          (equation 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.channels import input_size, quantized_readers, weight_absmax
from bitgrain.transforms.proof import check_same, routes
from bitgrain.transforms.rescale import rescale, to_columns
from bitgrain.transforms.simulate import can_simulate, quantized

_SMALLEST = 1e-5
_GRID = tuple(step / 20 for step in range(21))


@register_transform("smoothquant")
@dataclass(frozen=True)
class SmoothQuant:
    """alpha    how much of the difficulty moves into the weights; 0.5 is the authors' for most models
    search   choose alpha for each pair by the block's output error with that pair's readers quantized (not for stacks
             of experts with quantized inputs: these get `alpha`)
    pairs    "norm" (norm -> linears, as the authors'), "linear" (v -> o, up -> down), or "all"
    samples  calibration batches that the search looks at
    """

    alpha: float = 0.5
    search: bool = False
    pairs: str = "norm"
    samples: int = 2
    whole_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(f"smoothquant: alpha is between 0 and 1, not {self.alpha}")
        check_kinds(self.pairs, "smoothquant")

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Nothing: what lies outside the blocks has no pair that is quantized with its inputs."""
        del view
        return {}

    def apply(self, block: BlockView) -> dict[str, Any]:
        routed, largest = routes(block.module), 0.0
        alphas: dict[str, float] = {}
        for pair in block.pairs:
            readers = quantized_readers(block, pair)
            largest_x = input_size(block, pair, dict(block.absmax), "max")
            if self.pairs not in (pair.kind, "all") or not readers or largest_x is None:
                continue
            largest_w = weight_absmax(block, pair, readers)
            alpha = self.alpha
            if self.search and all(can_simulate(block, name) for name in readers):
                alpha = self._best(block, pair, readers, largest_x, largest_w)
            before = block.run(0)
            rescale(block.module, pair, smoothing(largest_x, largest_w, alpha))
            difference = check_same(before, block.run(0), block.path, f"smoothing {pair}", routed)
            largest = max(largest, difference)
            alphas[pair.writer] = alpha
        return {"alpha": alphas, "difference": largest}

    def _best(self, block: BlockView, pair: Pair, readers: list[str], x: Tensor, w: Tensor) -> float:
        samples = range(min(self.samples, block.samples))
        wanted = [block.run(i) for i in samples]
        best = (float("inf"), self.alpha)
        for alpha in _GRID:
            columns = to_columns(pair, smoothing(x, w, alpha))
            with quantized(block.module, pair, readers, block.specs, columns):
                error = sum(float((block.run(i) - y).double().square().sum()) for i, y in zip(samples, wanted))
            best = min(best, (error, alpha))
        return best[1]


def smoothing(largest_x: Tensor, largest_w: Tensor, alpha: float) -> Tensor:
    """Equation 4: what each channel of the weights is multiplied by; 1 where inputs or weights are all zero."""
    factors = largest_x.clamp_min(_SMALLEST) ** alpha / largest_w.clamp_min(_SMALLEST) ** (1 - alpha)
    return torch.where((largest_x == 0) | (largest_w == 0), 1.0, factors.clamp_min(_SMALLEST))


def check_kinds(kinds: str, name: str) -> None:
    """Raises SchemeError for a choice of pairs that there is not."""
    if kinds not in ("norm", "linear", "all"):
        raise SchemeError(f"{name}: pairs is norm, linear or all, not {kinds!r}")
