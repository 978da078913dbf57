import math

import pytest
import torch

from bitgrain.numerics import QuantSpec, get_format, per_channel, per_tensor
from bitgrain.numerics.ranges import KL
from bitgrain.numerics.ranges.kl import abs_histogram

INT8 = QuantSpec(get_format("int8"), per_tensor(), restricted=True)


def slow_threshold(counts, width, levels, stride):
    """Migacz's algorithm with loops; bins share a level if their centres round to it. Returns (divergence,
    threshold).
    """
    bins = len(counts)
    results = []
    for i in sorted({*range(min(bins, levels), bins, stride), bins}):
        p = counts[:i]
        p = [*p[:-1], p[-1] + sum(counts[i:])]
        top = levels - 1
        level = [min(top, round((j + 0.5) / i * top)) for j in range(i)]
        q = [0.0] * i
        for each in set(level):
            members = [j for j in range(i) if level[j] == each]
            filled = [j for j in members if counts[j] > 0]
            for j in filled:
                q[j] = sum(counts[m] for m in members) / len(filled)
        p_sum, q_sum = sum(p), sum(q) or 1.0
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += a / p_sum * math.log(a / p_sum / max(b / q_sum, 1e-4 / i))
        results.append((divergence, i * width))
    return min(results)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_slow_algorithm(seed):
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed))
    x[0, :3] *= 4
    chosen = KL(bins=300, stride=7)
    counts, width = abs_histogram(x, 300)
    threshold = chosen.threshold(counts, width, x.amin(-1), x.amax(-1), INT8)
    expected = slow_threshold([int(c) for c in counts[0]], float(width), 128, 7)
    assert float(threshold) == pytest.approx(expected[1], rel=1e-5)


def test_histograms_count_magnitudes():
    x = torch.tensor([[0.0, 0.1, -0.1, 0.99, -1.0, math.nan], [2.0, -2.0, 1.0, 0.5, 0.0, 0.0]])
    counts, width = abs_histogram(x, 4)
    assert counts.tolist() == [[3, 0, 0, 2], [2, 1, 1, 2]]
    assert width.tolist() == [0.25, 0.5]


def test_outliers_are_clipped_and_uniform_data_is_not():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 1, 50_000, generator=generator)
    normal[..., :3] = torch.tensor([40.0, -42.0, 45.0])
    _, high = KL().limits(normal, INT8)
    assert 3 < float(high) < 20
    uniform = torch.rand(1, 1, 50_000, generator=generator) * 2 - 1
    low, high = KL().limits(uniform, INT8)
    assert (float(low), float(high)) == (float(uniform.min()), float(uniform.max()))


@pytest.mark.parametrize("name", ["int4", "uint8", "fp8_e4m3", "fp4_e2m1", "nf4", "ternary"])
def test_every_format_gets_limits_within_the_data(name):
    zero_point = "integer" if name == "uint8" else "none"
    spec = QuantSpec(get_format(name), per_channel(), zero_point=zero_point)
    x = torch.randn(1, 3, 3000, generator=torch.Generator().manual_seed(2))
    x[0, 1] = x[0, 1].abs()
    low, high = KL(stride=64).limits(x, spec)
    assert bool(((low >= x.amin(-1)) & (high <= x.amax(-1)) & (high > 0)).all())


def test_tiles_do_not_see_each_other():
    x = torch.randn(1, 3, 3000, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 10, 0.1]).view(1, 3, 1)
    together = KL(stride=64).limits(x, INT8)
    for tile in range(3):
        alone = KL(stride=64).limits(x[:, tile : tile + 1], INT8)
        assert alone[1].item() == together[1][0, tile].item()
