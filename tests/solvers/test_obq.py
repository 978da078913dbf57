"""OBQ against its definition, and the order RTN > GPTQ > OBQ over random layers."""

from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_channel, quantize
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS
from bitgrain.solvers import Moments, get_solver, obq
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.objective import layer_error
from bitgrain.solvers.obq import OBQ
from bitgrain.solvers.rtn import RoundToNearest
from random_specs import LAWS, same, specs

W4 = int_weight(4, 16, asymmetric=True)


def layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.1
    mix = torch.eye(cols) + 2 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=generator) @ mix
    return weight, Moments(x.t() @ x / x.shape[0], x.shape[0])


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(
    "spec", [W4, int_weight(2), QuantSpec(get_format("nf4"), per_channel())], ids=["w4", "w2", "nf4"]
)
def test_equals_solving_for_the_free_weights_each_time(
    spec: QuantSpec, outliers: bool, monkeypatch: pytest.MonkeyPatch
):
    """After each rounding the free weights are the least-squares optimum given all that is rounded already."""
    monkeypatch.setattr(obq, "_PIECE", 2 * 20 * 20)
    weight, moments = layer(5, 20, seed=4)
    found = OBQ(damping=0.02, outliers=outliers).solve(weight, spec, moments).q
    h = moments.hessian.double() + 0.02 * moments.hessian.double().diagonal().mean() * torch.eye(20)
    base = quantize(weight, spec)
    margin = 0.5 if spec.format.name != "nf4" else (1.0 - 0.722956657409668) / 2
    for row in range(5):
        w, free = weight[row].double().clone(), list(range(20))
        codes = [0] * 20
        while free:
            q = quantize(
                w.float().expand(5, 20), spec, scale=base.scale, zero=base.zero
            )  # all rows under their own scales; only this row is looked at
            error = (w - q.dequantize()[row].double())[free]
            inverse = torch.linalg.inv(h[free][:, free])
            cost = error.square() / inverse.diagonal()
            if outliers:
                step = base.scale.float()[row].repeat_interleave(20 if base.scale.shape[1] == 1 else 16)[:20][free]
                shift = 0.0 if base.zero is None else base.zero.float()[row].repeat_interleave(16)[:20][free]
                v = w.float()[free] / step + shift
                beyond = (v > spec.high + margin) | (v < spec.low - margin)
                cost = torch.where(beyond, -error.square(), cost)
            p = int(cost.argmin())
            codes[free[p]] = int(q.codes[row, free[p]])
            w[free] -= error[p] / inverse[p, p] * inverse[p]
            del free[p]
        assert found.codes[row].tolist() == codes


@settings(LAWS, max_examples=30)
@given(specs(), st.integers(0, 2**31))
def test_without_correlation_it_is_round_to_nearest(spec: QuantSpec, seed: int):
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[2] = 0.0
    moments = Moments(torch.eye(11), 100)
    try:
        expected = RoundToNearest().solve(weight, spec, moments).q
    except NumericsError:  # a scale beyond its storage
        with pytest.raises(NumericsError):
            OBQ().solve(weight, spec, moments)
        return
    assert same(OBQ().solve(weight, spec, moments).q, expected)


@pytest.mark.parametrize("spec", [int_weight(4), int_weight(3, 16, asymmetric=True), int_weight(2, 16)], ids=str)
def test_the_mean_error_falls_from_rtn_to_gptq_to_obq(spec: QuantSpec):
    """GPTQ in the order of the columns, as its authors have it by default."""
    solvers = [get_solver("rtn"), GPTQ(order="none"), get_solver("obq")]
    errors: list[list[float]] = [[], [], []]
    for seed in range(8):
        weight, moments = layer(16, 32, seed)
        power = layer_error(weight, torch.zeros_like(weight), moments.hessian)
        for solver, found in zip(solvers, errors, strict=True):
            found.append(layer_error(weight, solver.solve(weight, spec, moments).q, moments.hessian) / power)
    rtn, gptq, best = (mean(found) for found in errors)
    assert rtn > gptq > best


@pytest.mark.parametrize("name", ["W4A16", "NVFP4", "FP8_BLOCK", "W8A16_TENSOR"])
def test_presets_are_better_than_round_to_nearest(name: str):
    weight, moments = layer(6, 40)
    spec = PRESETS[name].weight
    found = OBQ().solve(weight, spec, moments)
    assert found.method == "obq"
    assert found.figures == {"damping": 0.01}
    rtn = RoundToNearest().solve(weight, spec).q
    assert layer_error(weight, found.q, moments.hessian) < 0.9 * layer_error(weight, rtn, moments.hessian)


def test_limits_and_bad_input():
    weight, moments = layer(4, 8)
    with pytest.raises(SchemeError, match=r"up_proj has 1025 input features: obq takes up to 1024"):
        OBQ().solve(torch.zeros(2, 1025), W4, Moments(torch.eye(1025), 5), name="up_proj")
    with pytest.raises(SchemeError, match="up_proj: obq needs the second moments"):
        OBQ().solve(weight, W4, name="up_proj")
    with pytest.raises(NumericsError, match="up_proj: 64 of the 64"):
        OBQ().solve(weight, W4, Moments(moments.hessian * float("inf"), 5), name="up_proj")
    with pytest.raises(SchemeError, match="damping"):
        OBQ(damping=-1.0)
    found = OBQ().solve(weight, W4, Moments(torch.zeros(8, 8), 0))
    assert found.method == "rtn"
    assert found.notes == ("calibration sent it no tokens: rounded to nearest",)
