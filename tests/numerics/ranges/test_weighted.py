import pytest
import torch

from bitgrain.numerics import QuantSpec, get_format, per_channel, per_group, quantize
from bitgrain.numerics.ranges import MSE, Weighted


def data(rows=5, cols=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator), torch.rand(cols, generator=generator) ** 4 * 10


def weighted_loss(x, q, importance):
    return float(((q.dequantize().double() - x).square() * importance).sum())


def test_binary_gets_the_weighted_mean_magnitude():
    x, importance = data()
    spec = QuantSpec(get_format("binary"), per_channel(), range=Weighted())
    expected = (x.abs() * importance).sum(-1, keepdim=True) / importance.sum()
    assert torch.allclose(quantize(x, spec, importance=importance).scale, expected, rtol=1e-6)
    assert torch.allclose(quantize(x, spec).scale, x.abs().mean(-1, keepdim=True), rtol=1e-6)


def test_ternary_reaches_a_fixed_point_of_least_squares():
    x, importance = data()
    spec = QuantSpec(get_format("ternary"), per_channel(), range=Weighted(iterations=8))
    q = quantize(x, spec, importance=importance)
    v = q.spec.format.decode(q.codes)
    best = (x * v * importance).sum(-1, keepdim=True) / (v * v * importance).sum(-1, keepdim=True)
    assert torch.allclose(q.scale, best, rtol=1e-5)


@pytest.mark.parametrize("name", ["int2", "int4", "fp4_e2m1", "nf4", "ternary", "binary"])
@pytest.mark.parametrize("size", [16, 20])
def test_never_worse_than_minmax_on_its_objective(name, size):
    x, importance = data()
    plain = QuantSpec(get_format(name), per_group(size))
    chosen = QuantSpec(get_format(name), per_group(size), range=Weighted())
    q, reference = quantize(x, chosen, importance=importance), quantize(x, plain)
    assert weighted_loss(x, q, importance) <= weighted_loss(x, reference, importance) * (1 + 1e-6)


@pytest.mark.parametrize("zero_point", ["integer", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric(zero_point, bits):
    x, importance = data()
    x = x + 0.7
    format = get_format(f"uint{bits}")
    plain = QuantSpec(format, per_group(16), zero_point=zero_point)
    chosen = QuantSpec(format, per_group(16), zero_point=zero_point, range=Weighted())
    q = quantize(x, chosen, importance=importance)
    assert weighted_loss(x, q, importance) <= weighted_loss(x, quantize(x, plain), importance) * (1 + 1e-6)
    if bits <= 4:
        by_mse = QuantSpec(format, per_group(16), zero_point=zero_point, range=MSE())
        assert weighted_loss(x, q, importance) < weighted_loss(x, quantize(x, by_mse), importance)


def test_importance_decides_what_is_kept():
    x = torch.tensor([[1.0, 1.0, 1.0, 10.0]])
    spec = QuantSpec(get_format("binary"), per_channel(), range=Weighted())
    small = quantize(x, spec, importance=torch.tensor([1.0, 1, 1, 0])).scale.item()
    large = quantize(x, spec, importance=torch.tensor([0.0, 0, 0, 1])).scale.item()
    assert (small, large) == (1.0, 10.0)


def test_no_importance_at_all_leaves_minmax():
    x, _ = data()
    spec = QuantSpec(get_format("int4"), per_channel(), range=Weighted())
    q = quantize(x, spec, importance=torch.zeros(48))
    assert torch.equal(q.scale, quantize(x, QuantSpec(get_format("int4"), per_channel())).scale)
