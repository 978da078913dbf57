"""Ranges, outliers and moments of channels: what weights and inputs are described by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics.sums import row_sums

OUTLIER_RATIO = 6.0
"""A channel is an outlier when its absmax is above this many times the median absmax of the channels."""
TOP_CHANNELS = 8


@dataclass(frozen=True)
class ChannelRange:
    """The smallest and largest element of one channel."""

    index: int
    minimum: float
    maximum: float


@dataclass(frozen=True)
class ChannelRanges:
    """The ranges of all channels along one axis.

    absmax, median_absmax, smallest_absmax   over the channels; the last two leave out channels that are all zero
    ratio     absmax / median_absmax; None if every channel is zero
    outliers  channels whose absmax is above `OUTLIER_RATIO` x median_absmax
    dead      channels that are all zero
    top       the channels of the largest absmax, largest first
    """

    channels: int
    absmax: float
    median_absmax: float
    smallest_absmax: float
    ratio: float | None
    outliers: int
    dead: int
    top: tuple[ChannelRange, ...]


def describe_channels(low: Tensor, high: Tensor) -> ChannelRanges:
    """From the smallest and the largest element of each channel, both [channels] and finite."""
    low, high = low.cpu().double(), high.cpu().double()
    absmax = torch.maximum(high, -low)
    ordered, order = torch.sort(absmax, descending=True, stable=True)
    alive = int((ordered > 0).sum())
    # the median of an even number of channels is the mean of the two in the middle
    median = float((ordered[(alive - 1) // 2] + ordered[alive // 2]) / 2) if alive else 0.0
    top = [int(i) for i in order[: min(TOP_CHANNELS, alive)]]
    return ChannelRanges(
        channels=absmax.numel(),
        absmax=float(ordered[0]),
        median_absmax=median,
        smallest_absmax=float(ordered[alive - 1]) if alive else 0.0,
        ratio=float(ordered[0]) / median if alive else None,
        outliers=int((absmax > OUTLIER_RATIO * median).sum()) if alive else 0,
        dead=absmax.numel() - alive,
        top=tuple(ChannelRange(i, float(low[i]), float(high[i])) for i in top),
    )


def power_sums(x: Tensor) -> Tensor:
    """Sums of x, x^2, x^3 and x^4 of each row of a matrix: float64 [rows, 4]."""
    x = x.double()
    square = x * x
    sums = [row_sums(x), row_sums(square), row_sums(square * x), row_sums(square.square_())]
    return torch.stack(sums, dim=-1)


def excess_kurtosis(sums: Sequence[float], count: int) -> float | None:
    """Fourth central moment / variance^2 - 3 (0 for a normal distribution) from `power_sums` of `count` elements.

    None where all elements are equal.
    """
    m1, m2, m3, m4 = (total / count for total in sums)
    variance = m2 - m1 * m1
    if variance <= 1e-12 * m2:
        return None
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    return fourth / variance / variance - 3


def sqnr_db(power: float, error: float) -> float:
    """10 log10(power / error); inf where there is no error."""
    if error == 0:
        return math.inf
    return 10 * math.log10(power / error) if power > 0 else -math.inf


# --- Activations -------------------------------------------------------------------------------------------------
