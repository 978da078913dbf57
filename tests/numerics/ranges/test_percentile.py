import math

import pytest
import torch

from bitgrain.numerics import QuantSpec, get_format, per_tensor
from bitgrain.numerics.ranges import Percentile

SYMMETRIC = QuantSpec(get_format("int8"), per_tensor())
ASYMMETRIC = QuantSpec(get_format("uint8"), per_tensor(), zero_point="integer")


@pytest.mark.parametrize("percent", [51.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("n", [1, 2, 10, 1001])
def test_it_is_torch_quantile(percent, n):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    low, high = Percentile(percent).limits(x, ASYMMETRIC)
    wide = x.double()
    assert torch.allclose(high.double(), torch.quantile(wide, percent / 100, dim=-1), rtol=1e-6, atol=1e-7)
    assert torch.allclose(low.double(), torch.quantile(wide, 1 - percent / 100, dim=-1), rtol=1e-6, atol=1e-7)
    low, high = Percentile(percent).limits(x, SYMMETRIC)
    assert torch.equal(low, -high)
    assert torch.allclose(high.double(), torch.quantile(wide.abs(), percent / 100, dim=-1), rtol=1e-6, atol=1e-7)


def test_what_fills_a_cut_tile_does_not_count():
    x = torch.full((1, 2, 10), math.nan)
    x[0, 0] = torch.arange(10.0)
    x[0, 1, :4] = torch.arange(4.0)
    low, high = Percentile(75).limits(x, ASYMMETRIC)
    assert high.tolist() == [[6.75, 2.25]]
    assert low.tolist() == [[2.25, 0.75]]


def test_a_hundred_percent_is_minmax():
    x = torch.randn(1, 4, 33)
    low, high = Percentile(100).limits(x, ASYMMETRIC)
    assert torch.equal(low, x.amin(-1))
    assert torch.equal(high, x.amax(-1))


@pytest.mark.slow
def test_more_elements_than_torch_quantile_takes():
    x = torch.arange(17_000_000, dtype=torch.float32).view(1, 1, -1)
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.999)
    _, high = Percentile(99.9).limits(x, SYMMETRIC)
    assert float(high) == pytest.approx(16_999_999 * 0.999, abs=1)
