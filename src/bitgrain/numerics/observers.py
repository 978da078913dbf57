"""Observers: static activation ranges from a stream of batches. Values and pure functions; nothing is hooked or global.

    state = start(spec.range)
    for batch in batches:
        state = update(state, batch)
    low, high = limits(state, spec)

All limits are per tensor. `from_batches` makes the state of any range from one histogram and the ends of each batch, so
that data seen once serves them all. What each range keeps, and what its result depends on:

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
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.affine import store_zero
from bitgrain.numerics.clusters import Clusters
from bitgrain.numerics.formats import Format
from bitgrain.numerics.outliers import column_dtype
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


def keeps_histogram(range: Range) -> bool:
    """Whether limits by `range` need a histogram. Raises SchemeError for a range that cannot be observed."""
    return start(range).counts is not None


def from_batches(
    range: Range, ends: Tensor, elements: int, counts: Tensor | None = None, exponent: int = -1000
) -> State:
    """The state of `range` from what a histogram's state kept, and the ends of every batch, for any range.

    ends    [batches, 2]: smallest and largest element of each batch, in order
    counts, exponent, elements  as in `State`; minmax and moving_average need no histogram
    Raises SchemeError for a range that cannot be observed, or that needs a histogram where there is none.
    """
    empty = start(range)
    if not elements:
        return empty
    batches = ends.to("cpu", torch.float64)
    low, high = float(batches[:, 0].amin()), float(batches[:, 1].amax())
    if isinstance(range, MovingAverage):
        low, high = batches[0].tolist()
        for smallest, largest in batches[1:].tolist():
            low = range.momentum * low + (1 - range.momentum) * smallest
            high = range.momentum * high + (1 - range.momentum) * largest
    if empty.counts is None:
        return State(range, low, high, elements)
    if counts is None:
        raise SchemeError(f"range {range} needs histograms, and these statistics were taken without them")
    return State(range, low, high, elements, counts.cpu(), exponent)


def merge(a: State, b: State) -> State:
    """The state of the data of both; the same whichever comes first.

    Raises SchemeError for different ranges, and for moving averages, which have an order: keep their batches and use
    `from_batches`.
    """
    if a.range != b.range or isinstance(a.range, MovingAverage):
        raise SchemeError(f"observers of {a.range} and {b.range} cannot be merged")
    low, high = min(a.low, b.low), max(a.high, b.high)
    both = replace(a, low=low, high=high, elements=a.elements + b.elements)
    if a.counts is None or b.counts is None:
        return both
    exponent = max(a.exponent, b.exponent)
    return replace(both, counts=_widen(a, exponent) + _widen(b, exponent), exponent=exponent)


def _widen(state: State, exponent: int) -> Tensor:
    """The counts of `state` in bins of 2**exponent, at least as wide as its own."""
    assert state.counts is not None
    counts = state.counts
    for _ in range(min(exponent - state.exponent, 20) if bool(counts.any()) else 0):
        left, right = counts[:HALF].view(-1, 2).sum(-1), counts[HALF:].view(-1, 2).sum(-1)
        empty = torch.zeros(HALF // 2, dtype=torch.int64)
        counts = torch.cat([empty, left, right, empty])
    return counts


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
    exponent = max(state.exponent, needed)
    counts = _widen(state, exponent)
    for piece in x.reshape(-1).split(2**20):  # float64 is 8 bytes an element
        index = piece.double().mul_(math.ldexp(1.0, -exponent)).floor_().to(torch.int64).add_(HALF)
        counts = counts + torch.bincount(index, minlength=2 * HALF).cpu()
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
    if spec.minimum is not None:
        raise SchemeError(f"{name}: inputs have zero points, not minima: {spec.describe()}")
    scale, zero = scale_from_limits(*limits(state, spec), spec)
    stored = store_scale(scale, spec, name)
    return stored, store_zero(zero, scale, scale_values(stored), spec)


@dataclass(frozen=True)
class StaticInput:
    """The fixed scale of a layer's inputs, as it is stored.

    scale  [1, 1] in the storage dtype of its spec; [1, in] for a scale for each channel; of inputs in clusters
           [1, clusters]
    zero   None if symmetric, else codes (or numbers) of the scale's shape
    sizes  inputs in clusters: int32 [clusters], how many channels each has, 0 for those that were not needed; else None
    order  inputs in clusters: [channels], which of the original channels comes to each place; else None
    """

    scale: Tensor
    zero: Tensor | None = None
    sizes: Tensor | None = None
    order: Tensor | None = None

    def by_channel(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point [1, channels] of inputs in clusters."""
        assert self.sizes is not None
        sizes = self.sizes.to(self.scale.device, torch.int64)
        zero = None if self.zero is None else self.zero.repeat_interleave(sizes, -1)
        return self.scale.repeat_interleave(sizes, -1), zero

    @staticmethod
    def of_clusters(parts: Sequence[StaticInput], clusters: Clusters, count: int) -> StaticInput:
        """One for each cluster, side by side; what is missing to `count` has no channels, and the scale 1."""
        first, spare = parts[0], count - len(parts)
        scale = torch.cat([*(one.scale for one in parts), first.scale.new_ones(1, spare)], -1)
        zeros = [one.zero for one in parts if one.zero is not None]
        zero = torch.cat([*zeros, zeros[0].new_zeros(1, spare)], -1) if zeros else None
        sizes = torch.tensor([*clusters.sizes, *([0] * spare)], dtype=torch.int32)
        return StaticInput(scale, zero, sizes, clusters.order.to(column_dtype(len(clusters.order))))


def static_input(state: State, spec: QuantSpec, name: str = "activation") -> StaticInput:
    """What a layer's file holds for inputs that were observed as `state`.

    Raises SchemeError for a spec that is not static and per tensor with plainly stored scales, or if nothing was seen;
    NumericsError if the scale overflows its storage dtype.
    """
    if spec.dynamic or (spec.granularity.rows, spec.granularity.cols) != (None, None):
        raise SchemeError(
            f"{name}: inputs {spec.describe()} have no static scale, only per_tensor ones that are static"
        )
    scale, zero = static_scale(state, spec, name)
    if not isinstance(scale, Tensor):
        raise SchemeError(f"{name}: static inputs need plainly stored scales, not those of {spec.describe()}")
    return StaticInput(scale, zero)


def static_channels(low: Tensor, high: Tensor, spec: QuantSpec, name: str = "activation") -> StaticInput:
    """A scale for each input channel, from the smallest and largest element of each, [in] (granularity per_channel(1)).

    Raises SchemeError for another range than minmax or scales that are not plainly stored; NumericsError if a scale
    overflows its storage dtype.
    """
    if type(spec.range) is not MinMax or not isinstance(spec.scale, Format):
        raise SchemeError(
            f"{name}: inputs {spec.describe()}: static scales for each channel are plainly stored and take range minmax"
        )
    ideal, zero = scale_from_limits(low.view(1, -1), high.view(1, -1), spec)
    stored = store_scale(ideal, spec, name)
    assert isinstance(stored, Tensor)
    return StaticInput(stored, store_zero(zero, ideal, scale_values(stored), spec))


def shared_input(inputs: Sequence[StaticInput], spec: QuantSpec) -> StaticInput:
    """One scale for several layers that an engine runs as one: the least that reaches as far as each of them.

    Symmetric: the largest scale, as vLLM takes it. Asymmetric: the union of their ranges. Raises SchemeError for
    different clusters of channels.
    """
    first = inputs[0]
    if all(_alike(one, first) for one in inputs[1:]):
        return first
    if first.sizes is not None:
        raise SchemeError("layers that run as one have different clusters of input channels")
    scales = torch.stack([one.scale.to(torch.float32) for one in inputs])
    if spec.symmetric:
        return inputs[int(scales.view(len(inputs)).argmax())]
    zeros = torch.stack([one.zero.to(torch.float32) for one in inputs if one.zero is not None])
    low, high = (scales * (spec.low - zeros)).amin(0), (scales * (spec.high - zeros)).amax(0)
    scale, zero = scale_from_limits(low, high, spec)
    stored = store_scale(scale, spec)
    assert isinstance(stored, Tensor)
    return StaticInput(stored, store_zero(zero, scale, scale_values(stored), spec))


def _alike(a: StaticInput, b: StaticInput) -> bool:
    return all(_same(getattr(a, field.name), getattr(b, field.name)) for field in fields(StaticInput))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
