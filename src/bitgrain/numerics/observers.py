"""Observers: static activation ranges from a stream of batches. Values and pure functions; nothing is hooked or global.

    state = start(spec.range)
    for batch in batches:
        state = update(state, batch)
    low, high = limits(state, spec)

All limits are per tensor. What each range keeps, and what its result depends on:

    minmax           smallest and largest element: exact, however the data is cut into batches
    moving_average   the averages of both: depends on batches by definition
    percentile, mse, kl, weighted    a histogram: the same for any split and order of the data

Histogram bins are 2**k wide, k being the smallest for which the largest element fits into 4096 bins on each side of 0.
When a larger element comes, neighbouring bins merge, which is exact: so the final counts do not depend on the order.
The price is the bin width, at most 1/2048 of the largest magnitude: limits from a histogram lie within one bin width of
those from the data (percentile), or are those of data rounded to bin centres (mse, kl, weighted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.affine import store_zero
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import check_finite, store_scale
from bitgrain.numerics.ranges import KL, MSE, MinMax, MovingAverage, Percentile, Range, Weighted, scale_from_limits

if TYPE_CHECKING:
    from bitgrain.numerics.qtensor import QTensor
    from bitgrain.numerics.spec import QuantSpec

HALF = 4096
"""Bins on each side of 0."""


@dataclass(frozen=True)
class State:
    """What an observer has seen so far.

    low, high  smallest and largest element, or their moving averages (float64 numbers)
    elements   how many elements
    counts     int64 [2 * HALF]: elements with (j - HALF) * width <= x < (j - HALF + 1) * width; None without histogram
    exponent   width = 2**exponent
    """

    range: Range
    low: float = math.inf
    high: float = -math.inf
    elements: int = 0
    counts: Tensor | None = None
    exponent: int = -1000

    @property
    def width(self) -> float:
        """Of one bin."""
        return math.ldexp(1.0, self.exponent)


def start(range: Range) -> State:
    """A state that has seen nothing. Raises SchemeError for a range that cannot be observed."""
    if isinstance(range, MinMax):
        return State(range)
    if isinstance(range, (Percentile, MSE, KL, Weighted)):
        return State(range, counts=torch.zeros(2 * HALF, dtype=torch.int64))
    raise SchemeError(
        f"range {range} cannot be observed over batches; use minmax, moving_average, percentile, mse or kl"
    )


def update(state: State, x: Tensor, name: str = "activation") -> State:
    """The state after one more batch, any shape. Raises NumericsError for NaN and Inf."""
    if x.numel() == 0:
        return state
    x = x.detach().to(torch.float32)
    check_finite(x, name)
    low, high = float(x.amin()), float(x.amax())
    elements = state.elements + x.numel()
    if isinstance(state.range, MovingAverage) and state.elements:
        keep = state.range.momentum
        low = keep * state.low + (1 - keep) * low
        high = keep * state.high + (1 - keep) * high
        return replace(state, low=low, high=high, elements=elements)
    state = replace(state, low=min(state.low, low), high=max(state.high, high), elements=elements)
    return state if state.counts is None else _count(state, x)


def _count(state: State, x: Tensor) -> State:
    """`state` with the elements of `x` in its histogram; its low and high know `x` already."""
    assert state.counts is not None
    largest = max(-state.low, state.high)
    # frexp: largest < 2**e, so HALF bins of 2**e / HALF hold it; below 2**-100 all is one bin
    needed = max(-100, math.frexp(largest)[1]) - int(math.log2(HALF))
    counts, exponent = state.counts, state.exponent
    while exponent < needed and bool(counts.any()):
        left, right = counts[:HALF].view(-1, 2).sum(-1), counts[HALF:].view(-1, 2).sum(-1)
        empty = torch.zeros(HALF // 2, dtype=torch.int64)
        counts = torch.cat([empty, left, right, empty])
        exponent += 1
    exponent = max(exponent, needed)
    for piece in x.reshape(-1).split(2**20):  # float64 is 8 bytes an element
        index = torch.ldexp(piece.double(), torch.tensor(-exponent)).floor_().to(torch.int64).add_(HALF)
        counts = counts + torch.bincount(index.cpu(), minlength=2 * HALF)
    return replace(state, counts=counts, exponent=exponent)


def limits(state: State, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Low and high limit, float32 [1, 1], by the state's range for `spec`. Raises SchemeError if nothing was seen."""
    if not state.elements:
        raise SchemeError(f"observer of range {state.range} has seen no elements: calibrate with at least one batch")
    low, high = torch.tensor([[state.low]]), torch.tensor([[state.high]])
    if state.counts is None or state.low == state.high == 0:
        return low, high
    if isinstance(state.range, Percentile):
        below, above = _percentiles(state, state.range.percent / 100, spec.symmetric)
        return low.clamp(min=below), high.clamp(max=above)
    if isinstance(state.range, KL):
        counts = (state.counts[HALF:] + state.counts[:HALF].flip(0)).unsqueeze(0)
        used = int(counts.nonzero()[-1, -1].item()) + 1
        width = torch.tensor([state.width])
        threshold = state.range.threshold(counts[:, :used], width, low.view(1), high.view(1), spec).view(1, 1)
        return torch.maximum(low, -threshold), torch.minimum(high, threshold)
    # the bins stand for their elements, counted so many times; the two ends are known exactly
    filled = state.counts.nonzero().view(-1)
    centres = ((filled - HALF).double() + 0.5).mul_(state.width).clamp_(state.low, state.high).to(torch.float32)
    ends = torch.tensor([state.low, state.high])
    tiles = torch.cat([centres, ends]).view(1, 1, -1)
    weights = torch.cat([state.counts[filled].to(torch.float32), torch.zeros(2)]).view(1, 1, -1)
    if isinstance(state.range, MSE):
        return state.range.search(tiles, weights, spec)
    return state.range.limits(tiles, spec, weights)


def _percentiles(state: State, fraction: float, symmetric: bool) -> tuple[float, float]:
    """Where the histogram's cumulated counts reach the fraction, interpolated within the bin."""
    assert state.counts is not None
    if symmetric:
        high = _quantile(state.counts[HALF:] + state.counts[:HALF].flip(0), fraction) * state.width
        return -high, high
    low = HALF - _quantile(state.counts.flip(0), fraction)
    return low * state.width, (_quantile(state.counts, fraction) - HALF) * state.width


def _quantile(counts: Tensor, fraction: float) -> float:
    """Position, in bins from the left, below which `fraction` of the elements lie."""
    total = counts.cumsum(0)
    rank = (int(total[-1]) - 1) * fraction + 0.5  # element i of n sits at i + 1/2
    bin_index = int(torch.searchsorted(total.double(), torch.tensor(rank, dtype=torch.float64)).item())
    before = int(total[bin_index] - counts[bin_index])
    return bin_index + (rank - before) / int(counts[bin_index])


def static_scale(state: State, spec: QuantSpec, name: str = "activation") -> tuple[Tensor | QTensor, Tensor | None]:
    """Scale and zero point [1, 1] in storage, as `quantize(x, spec, scale=..., zero=...)` takes them.

    Raises NumericsError if the scale overflows its storage dtype, SchemeError if nothing was seen.
    """
    scale, zero = scale_from_limits(*limits(state, spec), spec)
    stored = store_scale(scale, spec, name)
    return stored, store_zero(zero, scale, scale_values(stored), spec)
