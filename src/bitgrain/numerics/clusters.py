"""Channels with like ranges put side by side, so that each such cluster can have one scale (RPTQ, arXiv 2304.01089).

A channel is the point (smallest, largest) of its inputs over the calibration data; k-means puts like channels into one
cluster, and an order makes the clusters contiguous. Where channels may only move within heads, each head
is clustered by itself; where they may not move at all, clusters are runs of neighbours.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDS = 100
"""Of k-means; it has settled long before."""


@dataclass(frozen=True)
class Clusters:
    """An order of channels, and how many of them, one after the other, share a scale.

    order  int64 [channels]: which channel comes to each place
    sizes  of the clusters, none of them 0; their sum is the number of channels
    """

    order: Tensor
    sizes: tuple[int, ...]


def kmeans(points: Tensor, count: int) -> Tensor:
    """int64 [n] on the CPU: the cluster of each point [n, d], 0 to at most count - 1; the same in every run.

    It starts from points that are each the farthest from those before (Gonzalez 1985), so that outliers are not
    overlooked, then moves centres to their means (Lloyd 1982). Fewer distinct points than `count` are clusters of
    their own.
    """
    points = points.detach().to("cpu", torch.float64)
    centres = [points[(points - points.mean(0)).square().sum(-1).argmin()]]
    nearest = (points - centres[0]).square().sum(-1)
    while len(centres) < count and float(nearest.max()) > 0:
        centres.append(points[nearest.argmax()])
        nearest = torch.minimum(nearest, (points - centres[-1]).square().sum(-1))
    middle = torch.stack(centres)
    labels = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        found = (points.unsqueeze(1) - middle).square().sum(-1).argmin(-1)
        if torch.equal(found, labels):
            break
        labels = found
        of_each = torch.bincount(labels, minlength=len(middle))
        sums = torch.zeros_like(middle).index_add_(0, labels, points)
        middle = torch.where((of_each > 0).unsqueeze(-1), sums / of_each.clamp_min(1).unsqueeze(-1), middle)
    return labels


def cluster_channels(low: Tensor, high: Tensor, count: int) -> Clusters:
    """At most `count` clusters of channels that may be put into any order: narrow ranges first, and within a cluster as
    they were.

    low, high  [channels]: smallest and largest of each
    """
    labels = kmeans(torch.stack([low, high], -1), count)
    width = (high - low).detach().to("cpu", torch.float64)
    of_each = torch.bincount(labels)
    mean = torch.zeros(len(of_each), dtype=torch.float64).index_add_(0, labels, width) / of_each.clamp_min(1)
    ranked = mean.masked_fill(of_each == 0, torch.inf).argsort(stable=True)
    place = torch.empty_like(ranked)
    place[ranked] = torch.arange(len(ranked))
    sizes = tuple(size for size in of_each[ranked].tolist() if size)
    return Clusters(place[labels].argsort(stable=True), sizes)


def cluster_within(low: Tensor, high: Tensor, count: int, head: int, repeats: int = 1) -> Clusters:
    """The same for channels that may only move within heads of `head` channels, `repeats` neighbouring heads all alike
    (query heads that read one head of values). Fewer clusters than heads: neighbouring heads share one.

    The order is of all channels; channels of heads that move alike do so by their common ranges.
    """
    heads = len(low) // head
    each = max(1, count // heads)
    lows, highs = low.view(-1, repeats, head).amin(1), high.view(-1, repeats, head).amax(1)
    order: list[Tensor] = []
    sizes: list[int] = []
    for group, (a, b) in enumerate(zip(lows, highs, strict=True)):
        found = cluster_channels(a, b, each)
        for repeat in range(repeats):
            order.append(found.order + (group * repeats + repeat) * head)
            sizes += found.sizes
    whole = torch.cat(order)
    where = whole.to(low.device)
    return Clusters(whole, join_neighbours(low[where], high[where], count, sizes))


def join_neighbours(low: Tensor, high: Tensor, count: int, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Sizes of at most `count` runs of channels that stay where they are. Neighbours (`sizes`; without it single
    channels) are joined as long as there are more, each time those two whose channels x range^2, which the noise of
    rounding follows, grows least.
    """
    starts = [0]
    for size in sizes or [1] * len(low):
        starts.append(starts[-1] + size)
    low, high = low.detach().to("cpu", torch.float64), high.detach().to("cpu", torch.float64)
    runs = list(pairwise(starts))
    spans = [(float(low[a:b].amin()), float(high[a:b].amax()), b - a) for a, b in runs]
    after = [*range(1, len(spans)), -1]
    before = [*range(-1, len(spans) - 1)]
    version = [0] * len(spans)
    waiting: list[tuple[float, int, int, int, int]] = []

    def offer(i: int) -> None:
        j = after[i] if i >= 0 else -1
        if j >= 0:
            cost = _noise(_joined(spans[i], spans[j])) - _noise(spans[i]) - _noise(spans[j])
            heapq.heappush(waiting, (cost, i, j, version[i], version[j]))

    for i in range(len(spans)):
        offer(i)
    left = len(spans)
    while left > count:
        _, i, j, of_i, of_j = heapq.heappop(waiting)
        if version[i] != of_i or version[j] != of_j:
            continue
        spans[i] = _joined(spans[i], spans[j])
        version[i], version[j], left = version[i] + 1, -1, left - 1
        after[i] = after[j]
        if after[i] >= 0:
            before[after[i]] = i
        offer(before[i])
        offer(i)
    return tuple(span[2] for span, one in zip(spans, version, strict=True) if one >= 0)


def _joined(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    return min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2]


def _noise(span: tuple[float, float, int]) -> float:
    return span[2] * (span[1] - span[0]) ** 2
