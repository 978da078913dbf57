import math

import pytest
import scalar_twin as twin
import torch
from hypothesis import given
from strategies import matrices

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_group, per_tensor, quantize
from bitgrain.numerics.measures import (
    code_use,
    compare,
    cosine,
    max_error,
    measure,
    mse,
    row_errors,
    sqnr_db,
    summarize,
)
from bitgrain.numerics.spec import int_weight


@given(matrices(), matrices())
def test_measures_are_their_definitions(x, y):
    y = y.flatten().repeat(50)[: x.numel()].view_as(x)
    report = compare(x, y)
    assert report.mse == pytest.approx(twin.mean_squared_error(x.tolist(), y.tolist()), rel=1e-5)
    a, b = x.double(), y.double()
    assert report.max_error == pytest.approx(float((a - b).abs().max()), rel=1e-6)
    if (a - b).square().sum() > 0 and a.square().sum() > 0 and b.square().sum() > 0:
        ratio = float(a.square().sum() / (a - b).square().sum())
        assert report.sqnr_db == pytest.approx(10 * math.log10(ratio), abs=1e-4)
        assert report.cosine == pytest.approx(
            float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()), abs=1e-9
        )


def test_the_edges():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert sqnr_db(zero, zero) == sqnr_db(one, one) == math.inf
    assert sqnr_db(zero, one) == -math.inf
    assert (cosine(zero, zero), cosine(one, zero), cosine(one, -one)) == (1.0, 0.0, -1.0)
    assert (mse(one, zero), max_error(one, -one)) == (1.0, 2.0)
    with pytest.raises(SchemeError, match="different shapes"):
        mse(one, torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(1, 300_001), (7, 40_000), (512, 520), (300_000,)])
def test_threads_and_row_splits_change_nothing(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(x, int_weight(4, 128))
    one = measure(x, q)
    torch.set_num_threads(2)
    try:
        two = measure(x, q)
        use = code_use(q)
    finally:
        torch.set_num_threads(1)
    assert one == two
    assert use == code_use(q)
    if len(shape) > 1:
        x_hat = q.dequantize()
        pieces = [row_errors(a, b) for a, b in zip(x.split(3), x_hat.split(3), strict=True)]
        assert summarize(pieces, x.numel()) == one


def test_code_use():
    spec = QuantSpec(get_format("int4"), per_group(8))
    x = torch.tensor([[-8.0, 7, 0, 0, 0, 0, 0, 0], [-8, -4, -2, -1, 0, 1, 2, 4]])
    use = code_use(quantize(x, spec))
    assert (use.hit_mean, use.hit_min) == (pytest.approx((3 / 8 + 1) / 2), 3 / 8)
    assert (use.span_mean, use.span_min) == (pytest.approx((1 + 12 / 15) / 2), 12 / 15)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp4_e2m1", "nf4", "ternary", "binary"])
@pytest.mark.parametrize("cols", [64, 50])
def test_code_use_counts_as_loops_do(name, cols):
    spec = QuantSpec(get_format(name), per_group(16))
    q = quantize(torch.randn(6, cols, generator=torch.Generator().manual_seed(1)), spec)
    use = code_use(q)
    usable = {"fp8_e4m3": 254, "ternary": 3, "binary": 2}.get(name, 2**spec.format.bits)
    hits, spans = [], []
    for row in q.codes:
        for part in row.split(16):
            v = spec.format.decode(part)
            hits.append(len(set(part.tolist())) / min(usable, part.numel()))
            spans.append(float(v.max() - v.min()) / (spec.high - spec.low))
    assert (use.hit_min, use.hit_mean) == (pytest.approx(min(hits)), pytest.approx(sum(hits) / len(hits)))
    assert (use.span_min, use.span_mean) == (pytest.approx(min(spans)), pytest.approx(sum(spans) / len(spans)))


def test_code_use_of_a_restricted_grid_and_of_wide_formats():
    spec = QuantSpec(get_format("int2"), per_tensor(), restricted=True)
    assert code_use(quantize(torch.tensor([-1.0, 0, 1, 1]), spec)).hit_mean == 1.0
    with pytest.raises(SchemeError, match="up to 8 bits"):
        code_use(quantize(torch.ones(4), QuantSpec(get_format("int16"), per_tensor())))
