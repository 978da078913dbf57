import math

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_channel, per_group, quantize
from bitgrain.numerics.formats import E8M0, FP16
from bitgrain.numerics.ranges import MSE, Weighted
from bitgrain.numerics.spec import int_weight


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


def test_the_larger_end_gets_the_one_more_code():
    x = torch.tensor([[8.0, -7.0, 3.0, -1.0], [-8.0, 7.0, -3.0, 1.0]])
    q = quantize(x, QuantSpec(get_format("int4"), per_channel(), range=Weighted(), scale=FP16))
    assert q.scale.tolist() == [[-1.0], [1.0]]
    assert q.codes.tolist() == [[-8, 7, -3, 1]] * 2
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(get_format("int4"), per_channel(), restricted=True),
        QuantSpec(get_format("int4"), per_channel(), dynamic=True),
        QuantSpec(get_format("int4"), per_channel(), scale=E8M0),
        QuantSpec(get_format("int4"), per_channel(), scale=int_weight(8, asymmetric=True)),
        QuantSpec(get_format("int4"), per_channel(), zero_point="real"),
        QuantSpec(get_format("uint4"), per_channel()),
        QuantSpec(get_format("nf4"), per_channel()),
    ],
    ids=lambda spec: spec.describe(),
)
def test_where_a_scale_has_no_sign_it_stays_positive(spec):
    x = torch.tensor([[8.0, -7.0, 3.0, -1.0]])
    scale, _ = Weighted().scale(x.view(1, 1, 4), spec)
    assert not spec.signed_scale
    assert scale.item() > 0


def best_of_a_dense_grid(x, w, bits):
    """Least weighted error of one tile under any of 4000 scales of either sign, in plain float64."""
    top = 2 ** (bits - 1)
    least = math.inf
    for i in range(1, 2001):
        for sign in (1, -1):
            s = sign * i / 2000 * 1.2 * max(map(abs, x)) / (top - 1)
            codes = [min(max(round(a / s), -top), top - 1) for a in x]
            least = min(least, sum(b * (a - s * c) ** 2 for a, b, c in zip(x, w, codes, strict=True)))
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_best_scale_of_all(bits):
    x, importance = data(6, 16, seed=bits)
    q = quantize(x, QuantSpec(get_format(f"int{bits}"), per_channel(), range=Weighted()), importance=importance)
    best = sum(best_of_a_dense_grid(row.tolist(), importance.tolist(), bits) for row in x)
    assert weighted_loss(x, q, importance) <= 1.02 * best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_candidates_lose_less(bits):
    x, importance = data(64, 64)
    losses = []
    for tried in (Weighted(signs=1), Weighted(signs=2)):
        q = quantize(x, QuantSpec(get_format(f"int{bits}"), per_group(16), range=tried), importance=importance)
        losses.append(weighted_loss(x, q, importance))
    assert losses[1] < 0.95 * losses[0]
    losses = []
    for tried in (Weighted(shifts=0), Weighted(shifts=1)):
        spec = QuantSpec(get_format(f"int{bits}"), per_group(16), "integer", range=tried)
        losses.append(weighted_loss(x, quantize(x, spec, importance=importance), importance))
    assert losses[1] < losses[0]


def test_limits_hold_the_grid_of_a_negative_scale():
    tiles = torch.tensor([[[8.0, -7.0, 3.0, -1.0]]])
    low, high = Weighted().limits(tiles, QuantSpec(get_format("int4"), per_channel()))
    assert (low.item(), high.item()) == (-7.0, 8.0)


def test_settings_without_a_meaning():
    for settings in ({"signs": 3}, {"shifts": -1}):
        with pytest.raises(SchemeError, match="signs of 1 or 2"):
            Weighted(**settings)
