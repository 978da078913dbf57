"""Half-quadratic quantization against a twin in plain Python, and its laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_block, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.granularity import to_tiles
from bitgrain.solvers import get_solver
from bitgrain.solvers.hqq import HQQ, shrink
from random_specs import LAWS, same, specs


def weights(rows: int = 5, cols: int = 48, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    x[rows // 2, 3] = 6.0
    return x


def losses(x: torch.Tensor, q, norm: float) -> torch.Tensor:
    """Of each tile."""
    error = (x - q.dequantize()).double().abs().pow(norm)
    return to_tiles(error, q.spec.granularity).sum(-1)


def twin(x: list[float], bits: int, fit_scale: bool, settings: HQQ) -> list[float]:
    """W_hat of one tile with a real zero point: the authors' loop, one number at a time."""
    top = 2**bits - 1
    scale = (max(x) - min(x)) / top
    zero = -min(x) / scale

    def decoded(s: float, z: float) -> list[tuple[int, float]]:
        codes = [min(max(round(a / s + z), 0), top) for a in x]
        return [(c, s * (c - z)) for c in codes]

    def loss(s: float, z: float) -> float:
        return sum(abs(a - b) ** settings.norm for a, (_, b) in zip(x, decoded(s, z), strict=True))

    start, beta = (scale, zero), settings.beta
    if bits == 4 and not fit_scale:
        zero = round(zero)
    for _ in range(settings.iterations):
        aims = []
        for a, (code, b) in zip(x, decoded(scale, zero), strict=True):
            e = abs(a - b)
            kept = math.copysign(max(e - e ** (settings.norm - 1) / beta, 0.0), a - b) if e > 0 else 0.0
            aims.append((code, a - kept))
        n = len(x)
        if fit_scale:
            mean_c, mean_a = sum(c for c, _ in aims) / n, sum(a for _, a in aims) / n
            scale = sum((c - mean_c) * (a - mean_a) for c, a in aims) / sum((c - mean_c) ** 2 for c, _ in aims)
        zero = sum(c - a / scale for c, a in aims) / n
        beta *= settings.kappa
    best = (scale, zero) if loss(scale, zero) < loss(*start) else start
    return [b for _, b in decoded(*best)]


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_the_twin(bits, scales, beta):
    x = weights(seed=bits)
    settings = HQQ(beta=beta, scales=scales)
    q = settings.solve(x, QuantSpec(get_format(f"uint{bits}"), per_group(16), zero_point="real")).q
    expected = torch.tensor(
        [
            [value for k in range(0, 48, 16) for value in twin(row[k : k + 16], bits, scales, settings)]
            for row in x.tolist()
        ]
    )
    assert torch.allclose(q.dequantize(), expected, atol=1e-4)


@LAWS
@given(specs(nested=False), st.integers(0, 100), st.booleans())
def test_no_tile_is_worse_than_its_start(spec, seed, scales):
    x = weights(5, 21, seed)
    solver = HQQ(iterations=4, scales=scales)
    before, after = losses(x, quantize(x, spec), 0.7), losses(x, solver.solve(x, spec).q, 0.7)
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all())


@LAWS
@given(specs(), st.integers(0, 100))
def test_no_matrix_is_worse_than_its_start(spec, seed):
    x = weights(5, 21, seed)
    before, after = losses(x, quantize(x, spec), 0.7).sum(), losses(x, HQQ(iterations=4).solve(x, spec).q, 0.7).sum()
    assert after <= before * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("zero_point", ["none", "integer", "real"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_gains(bits, zero_point):
    x = weights(32, 64)
    spec = QuantSpec(get_format(f"int{bits}"), per_group(32), zero_point=zero_point, scale=FP16)
    before, after = losses(x, quantize(x, spec), 0.7).sum(), losses(x, HQQ().solve(x, spec).q, 0.7).sum()
    assert after < 0.97 * before


def test_shrink_by_hand():
    x = torch.tensor([0.0, 4.0, -4.0, 0.01])
    # 4 - 4^-0.5 / 2 = 3.75; 0.01 is less than 0.01^-0.5 / 2 = 5
    assert shrink(x, 2.0, 0.5).tolist() == [0.0, 3.75, -3.75, 0.0]


def test_what_is_on_the_grid_stays():
    x = torch.tensor([[-8.0, 7.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    q = HQQ().solve(x, QuantSpec(get_format("int4"), per_group(4))).q
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("granularity", [per_group(16), per_block(2, 16)], ids=str)
def test_cut_tiles_and_pieces_of_the_work(granularity, monkeypatch):
    x = weights(5, 40)
    spec = QuantSpec(get_format("uint3"), granularity, zero_point="real")
    whole = HQQ().solve(x, spec).q
    rest = HQQ().solve(x[:4, 32:], QuantSpec(spec.format, granularity.__class__(granularity.rows, 8), "real")).q
    assert torch.equal(whole.codes[:4, 32:], rest.codes)
    monkeypatch.setattr("bitgrain.numerics.ranges.search.PIECE", 50)
    assert same(HQQ().solve(x, spec).q, whole)


def test_errors_name_what_is_wrong():
    spec = QuantSpec(get_format("uint4"), per_group(16), zero_point="real", scale=FP16)
    with pytest.raises(NumericsError, match="up_proj holds 1 NaN"):
        HQQ().solve(torch.tensor([[math.nan] * 1 + [1.0] * 15]), spec, name="up_proj")
    for settings in ({"norm": 0.0}, {"norm": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": 0}):
        with pytest.raises(SchemeError, match="hqq: 0 < norm <= 1"):
            get_solver({"name": "hqq", **settings})
    assert get_solver("hqq") == HQQ(0.7, 10.0, 1.01, 20)
