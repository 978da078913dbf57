"""What holds for every range; each method's own tests are beside."""

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_block, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.formats import E8M0, FP16
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import KL, MSE, RANGES, MinMax, MovingAverage, Percentile, Weighted, get_range
from bitgrain.numerics.spec import int_weight

FORMATS = ["int2", "int4", "int8", "fp4_e2m1", "fp8_e4m3", "nf4", "ternary", "binary"]
SEARCHES = [MSE(), MSE(norm=2.4), Weighted()]


def heavy_tailed(rows=6, cols=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 0.02
    x[torch.rand(rows, cols, generator=generator) < 0.02] *= 12
    x[0, :8] = 0
    return x


def loss(x, q, chosen):
    return float((q.dequantize().double() - x.double()).abs().pow(getattr(chosen, "norm", 2.0)).sum())


def test_get_range():
    assert get_range("minmax") == MinMax()
    assert get_range("KL") == KL()
    assert get_range({"name": "mse", "norm": 2.4, "steps": 10}) == MSE(2.4, 10)
    assert get_range(Percentile(99)) == Percentile(99)
    assert [get_range(name).name for name in RANGES] == list(RANGES)
    assert str(MSE()) == "mse(norm=2.0, steps=50, smallest=0.3)"
    with pytest.raises(SchemeError, match="known ranges: minmax, moving_average, percentile, mse, kl, weighted"):
        get_range("max")
    with pytest.raises(SchemeError, match="unknown range None"):
        get_range({"norm": 2})
    with pytest.raises(SchemeError, match="no setting 'power'; it has: norm, steps, smallest"):
        get_range({"name": "mse", "power": 3})
    with pytest.raises(SchemeError, match="norm is a float, not 'two'"):
        get_range({"name": "mse", "norm": "two"})
    with pytest.raises(SchemeError, match="steps is a int"):
        get_range({"name": "mse", "steps": 2.5})
    with pytest.raises(SchemeError, match="has no setting"):
        get_range({"name": "minmax", "percent": 3})


@pytest.mark.parametrize(
    "build",
    [
        lambda: MSE(steps=0),
        lambda: MSE(smallest=0),
        lambda: Percentile(50),
        lambda: Percentile(101),
        lambda: KL(bins=2),
        lambda: MovingAverage(1.0),
        lambda: Weighted(iterations=0),
    ],
)
def test_settings_without_a_meaning_are_refused(build):
    with pytest.raises(SchemeError):
        build()


def test_minmax_and_moving_average_are_the_extremes():
    x = heavy_tailed()
    spec = int_weight(4, 16, asymmetric=True)
    for chosen in (MinMax(), MovingAverage()):
        low, high = chosen.limits(x.view(1, 6, 70), spec)
        assert torch.equal(low[0], x.amin(-1))
        assert torch.equal(high[0], x.amax(-1))


@pytest.mark.parametrize("chosen", SEARCHES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("storage", [None, FP16, E8M0], ids=["float32", "float16", "e8m0"])
@pytest.mark.parametrize("granularity", [per_group(16), per_channel(), per_tensor(), per_block(4, 32)], ids=str)
def test_a_search_never_loses_to_minmax(chosen, name, storage, granularity):
    # rows of 70 are cut: what fills the last tile must not count
    x = heavy_tailed()
    spec = QuantSpec(get_format(name), granularity, scale=storage or get_format("float32"))
    plain = quantize(x, spec)
    searched = quantize(x, QuantSpec(spec.format, granularity, range=chosen, scale=spec.scale))
    assert loss(x, searched, chosen) <= loss(x, plain, chosen) * (1 + 1e-6)
    assert bool(torch.isfinite(scale_values(searched.scale)).all())


@pytest.mark.parametrize("chosen", SEARCHES, ids=str)
@pytest.mark.parametrize("zero_point", ["integer", "real"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_asymmetric_search_never_loses_to_minmax(chosen, zero_point, bits):
    x = heavy_tailed() + 0.01
    spec = QuantSpec(get_format(f"uint{bits}"), per_group(16), zero_point=zero_point)
    searched = QuantSpec(spec.format, spec.granularity, zero_point, range=chosen)
    assert loss(x, quantize(x, searched), chosen) <= loss(x, quantize(x, spec), chosen) * (1 + 1e-6)


@pytest.mark.parametrize("chosen", [get_range(name) for name in RANGES], ids=str)
@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_cut_tiles_are_chosen_as_if_alone(chosen, zero_point):
    x = heavy_tailed(4, 70)
    spec = QuantSpec(get_format("int4"), per_group(64), zero_point=zero_point, range=chosen)
    q = quantize(x, spec)
    alone = QuantSpec(get_format("int4"), per_group(6), zero_point=zero_point, range=chosen)
    rest = quantize(x[:, 64:], alone)
    assert torch.equal(q.codes[:, 64:], rest.codes)
    assert torch.equal(q.scale[:, 1:], rest.scale)


@pytest.mark.parametrize("chosen", [get_range(name) for name in RANGES], ids=str)
def test_zero_tiles_have_scale_one(chosen):
    q = quantize(torch.zeros(3, 32), QuantSpec(get_format("int4"), per_group(16), range=chosen))
    assert torch.equal(q.scale, torch.ones(3, 2))
    assert torch.equal(q.dequantize(), torch.zeros(3, 32))


@pytest.mark.parametrize("chosen", SEARCHES, ids=str)
def test_the_pieces_of_the_work_change_nothing(chosen, monkeypatch):
    x = heavy_tailed(8, 64)
    for spec in (int_weight(4, 16), QuantSpec(get_format("int4"), per_tensor())):
        spec = QuantSpec(spec.format, spec.granularity, range=chosen)
        monkeypatch.setattr("bitgrain.numerics.ranges.search.PIECE", 2**18)
        whole = quantize(x, spec)
        monkeypatch.setattr("bitgrain.numerics.ranges.search.PIECE", 100)
        assert torch.equal(quantize(x, spec).codes, whole.codes)


def test_threads_change_nothing():
    x = heavy_tailed(64, 1024)
    for name in RANGES:
        spec = QuantSpec(get_format("int4"), per_tensor(), range=get_range(name))
        one = quantize(x, spec)
        torch.set_num_threads(2)
        try:
            two = quantize(x, spec)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(one.scale, two.scale)
