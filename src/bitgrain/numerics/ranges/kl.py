"""KL (entropy) calibration: the threshold whose quantized histogram is closest to the original one.

S. Migacz, "8-bit Inference with TensorRT", GTC 2017 (slides 24-38 give the algorithm):

    histogram of |x| in 2048 bins
    for i from the number of levels to 2048:                # the candidate threshold is the right edge of bin i - 1
        P = bins[0:i], the bins beyond added to the last    # clipping as the quantized numbers will see it
        Q = bins[0:i] summed for each level, then spread evenly over those of its bins that are not empty
        divergence[i] = KL(P || Q), both normalized
    take the i with the smallest divergence

Three details are ours. Which bins share a level follows from the format itself: bin centres are divided by the
candidate's scale and rounded (for int8 these are the 128 levels of the slides; FP8, FP4 or NF4 work the same way).
Thresholds are tried in `stride` steps of bins. Where Q is empty and P is not, Q counts as 1e-4 of an even share instead
of 0, which keeps the divergence finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.formats import IntFormat
from bitgrain.numerics.quotient import quotient
from bitgrain.numerics.ranges.base import Range, scale_from_limits
from bitgrain.numerics.ranges.search import tile_pieces

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec

_EMPTY = 1e-4


@dataclass(frozen=True)
class KL(Range):
    """Smallest KL divergence of histograms. Meant for activations, per tensor or per channel: tiles of a few hundred
    elements have no histogram to speak of."""

    bins: int = 2048
    stride: int = 16
    name = "kl"
    fill = math.nan

    def __post_init__(self) -> None:
        if self.bins < 16 or self.stride < 1:
            raise SchemeError(f"kl: at least 16 bins and a stride of at least 1 are needed, not {self}")

    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = tiles.reshape(-1, tiles.shape[-1])
        low = flat.nan_to_num(nan=math.inf).amin(dim=-1)
        high = flat.nan_to_num(nan=-math.inf).amax(dim=-1)
        threshold = torch.empty_like(low)
        for part in tile_pieces(flat.shape[0], max(flat.shape[1], self.bins)):
            counts, width = abs_histogram(flat[part], self.bins)
            threshold[part] = self.threshold(counts, width, low[part], high[part], spec)
        low, high = torch.maximum(low, -threshold), torch.minimum(high, threshold)
        return low.view(tiles.shape[:-1]), high.view(tiles.shape[:-1])

    def threshold(self, counts: Tensor, width: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
        """The best threshold on |x|, float32 [t].

        counts     [t, bins]: elements with j * width <= |x| < (j + 1) * width; any number of bins
        width      [t]: of a bin
        low, high  [t]: the smallest and largest element; they say how an asymmetric grid lies
        """
        counts = counts.to(torch.float64)
        bins = counts.shape[-1]
        first = min(bins, max(2, 2 ** (spec.format.bits - 1)))
        # the last candidate is the last bin: no clipping
        candidates = sorted({*range(first, bins, self.stride), bins})
        centres = (torch.arange(bins, device=counts.device) + 0.5) * width.unsqueeze(-1)
        beyond = counts.flip(-1).cumsum(-1).flip(-1)  # [t, j]: elements in bin j and above
        best = torch.full(counts.shape[:1], math.inf, dtype=torch.float64, device=counts.device)
        result = width * bins
        for i in candidates:
            limit = width * i
            scale, _ = scale_from_limits(torch.maximum(low, -limit), torch.minimum(high, limit), spec)
            level = _levels(centres[:, :i] / torch.where(scale > 0, scale, 1.0).unsqueeze(-1), spec)
            p = counts[:, :i].clone()
            if i < bins:
                p[:, -1] += beyond[:, i]
            divergence = _divergence(p, counts[:, :i], level)
            better = divergence < best
            best = torch.where(better, divergence, best)
            result = torch.where(better, limit, result)
        return result.to(torch.float32)


def abs_histogram(tiles: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Counts [t, bins] of |x| for tiles [t, n] (NaN do not count), and the width [t] of a bin: largest / bins."""
    magnitude = tiles.abs()
    real = ~magnitude.isnan()
    magnitude = magnitude.nan_to_num(nan=0.0)
    width = quotient(magnitude.amax(dim=-1), bins)
    safe = torch.where(width > 0, width, torch.ones_like(width)).unsqueeze(-1)
    index = (magnitude / safe).to(torch.int64).clamp_(max=bins - 1)
    counts = torch.zeros(tiles.shape[0], bins, dtype=torch.float32, device=tiles.device)
    return counts.scatter_add_(-1, index, real.to(torch.float32)), width


def _levels(scaled: Tensor, spec: QuantSpec) -> Tensor:
    """Index of the level that each scaled magnitude is rounded to, ascending from 0: [t, i] int64."""
    if isinstance(spec.format, IntFormat):
        top = spec.high if spec.symmetric else spec.high - spec.low
        return scaled.round().clamp_(0, top).to(torch.int64)
    grid = spec.format.grid().to(scaled.device)
    return torch.searchsorted(grid, spec.format.round(scaled.to(torch.float32)).contiguous())


def _divergence(p: Tensor, counts: Tensor, level: Tensor) -> Tensor:
    """KL(P || Q) of each row, in nats; Q is `counts` averaged over the filled bins of each level."""
    filled = (counts > 0).to(torch.float64)
    levels = int(level.max().item()) + 1
    sums = torch.zeros(counts.shape[0], levels, dtype=torch.float64, device=counts.device)
    share = sums.clone().scatter_add_(-1, level, filled)
    sums = sums.scatter_add_(-1, level, counts)
    q = (sums / share.clamp(min=1)).gather(-1, level) * filled
    q = q / q.sum(-1, keepdim=True).clamp(min=1e-300)
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
    q = q.clamp(min=_EMPTY / p.shape[-1])
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
