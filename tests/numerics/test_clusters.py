"""Clusters of channels: laws of k-means, of the orders, and a slow twin for joining neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from bitgrain.numerics.clusters import cluster_channels, cluster_within, join_neighbours, kmeans

LAWS = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


def ranges(channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of channels, some of them outliers, some alike."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(channels, generator=generator))
    size[torch.rand(channels, generator=generator) < 0.1] *= 30
    low = -size * torch.rand(channels, generator=generator)
    return (low * 4).round() / 4, ((low + size) * 4).round() / 4


def spread(points: torch.Tensor, labels: torch.Tensor) -> float:
    return sum(float((points[labels == one] - points[labels == one].mean(0)).square().sum()) for one in labels.unique())


@LAWS
@given(st.integers(1, 80), st.integers(1, 12), seeds)
def test_kmeans_settles_and_every_run_gives_the_same(channels: int, count: int, seed: int):
    points = torch.stack(ranges(channels, seed), -1).double()
    labels = kmeans(points, count)
    assert torch.equal(labels, kmeans(points.clone(), count))
    assert int(labels.max()) < count
    centres = torch.stack([points[labels == one].mean(0) for one in labels.unique()])
    own = torch.stack([points[labels == one].mean(0) for one in labels.tolist()])
    nearest = (points.unsqueeze(1) - centres).square().sum(-1).amin(1)
    assert torch.all((points - own).square().sum(-1) <= nearest + 1e-9)
    if len(points.unique(dim=0)) <= count:
        assert spread(points, labels) == 0


@pytest.mark.parametrize("seed", range(3))
def test_as_tight_as_scikit_learn(seed: int):
    points = torch.stack(ranges(300, seed), -1).double()
    theirs = KMeans(16, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert spread(points, kmeans(points, 16)) < 1.5 * theirs


@LAWS
@given(st.integers(1, 60), st.integers(1, 12), seeds)
def test_clusters_are_contiguous_in_an_order_of_all_channels(channels: int, count: int, seed: int):
    low, high = ranges(channels, seed)
    found = cluster_channels(low, high, count)
    assert torch.equal(found.order.sort().values, torch.arange(channels))
    assert sum(found.sizes) == channels
    assert 0 < min(found.sizes) <= channels
    assert len(found.sizes) <= count
    labels = kmeans(torch.stack([low, high], -1), count)
    assert [len(run.unique()) for run in labels[found.order].split(found.sizes)] == [1] * len(found.sizes)
    assert all(torch.equal(run, run.sort().values) for run in found.order.split(found.sizes))


def test_one_cluster_moves_nothing_and_enough_leave_each_channel_alone():
    low, high = -torch.rand(20), torch.rand(20)
    assert torch.equal(cluster_channels(low, high, 1).order, torch.arange(20))
    assert cluster_channels(low, high, 20).sizes == (1,) * 20
    alike = cluster_channels(torch.full((6,), -1.0), torch.full((6,), 2.0), 4)
    assert (alike.sizes, alike.order.tolist()) == ((6,), list(range(6)))


@LAWS
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 40), seeds)
def test_heads_keep_their_places_and_query_heads_of_one_move_alike(groups: int, repeats: int, count: int, seed: int):
    head = 8
    low, high = ranges(groups * repeats * head, seed)
    found = cluster_within(low, high, count, head, repeats)
    heads = found.order.view(groups, repeats, head)
    starts = torch.arange(groups * repeats).view(groups, repeats, 1) * head
    inside = heads - starts
    assert torch.equal(inside.sort(-1).values, torch.arange(head).expand_as(inside))
    assert torch.equal(inside, inside[:, :1].expand_as(inside))
    assert sum(found.sizes) == len(low)
    assert len(found.sizes) <= count
    if count >= groups * repeats:  # then no cluster spans two heads
        ends = torch.tensor(found.sizes).cumsum(0).tolist()
        assert set(range(head, len(low) + 1, head)) <= set(ends)


def joined_slowly(low: list[float], high: list[float], count: int) -> tuple[int, ...]:
    spans = [(a, b, 1) for a, b in zip(low, high, strict=True)]

    def noise(span: tuple[float, float, int]) -> float:
        return span[2] * (span[1] - span[0]) ** 2

    def both(i: int) -> tuple[float, float, int]:
        one, other = spans[i], spans[i + 1]
        return min(one[0], other[0]), max(one[1], other[1]), one[2] + other[2]

    while len(spans) > count:
        costs = [noise(both(i)) - noise(spans[i]) - noise(spans[i + 1]) for i in range(len(spans) - 1)]
        best = costs.index(min(costs))
        spans[best : best + 2] = [both(best)]
    return tuple(span[2] for span in spans)


@LAWS
@given(st.integers(1, 30), st.integers(1, 8), seeds)
def test_joining_neighbours_as_its_slow_twin(channels: int, count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    low = -torch.rand(channels, generator=generator, dtype=torch.float64)
    high = torch.rand(channels, generator=generator, dtype=torch.float64)
    assert join_neighbours(low, high, count) == joined_slowly(low.tolist(), high.tolist(), count)
