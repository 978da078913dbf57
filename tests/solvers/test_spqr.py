"""SpQR against a slow twin of its loop, and its laws."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_block, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.leave_one_out import find_outliers
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import Scheme
from bitgrain.solvers import Moments, get_solver
from bitgrain.solvers.objective import layer_error
from bitgrain.solvers.spqr import SpQR, spqr_weight
from random_specs import LAWS, same, specs


def layer(rows: int = 6, cols: int = 32, seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 0.1
    x[torch.rand(rows, cols, generator=generator) < 0.02] *= 8
    inputs = torch.randn(4 * cols, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return x, Moments(inputs.T @ inputs / (4 * cols), 4 * cols)


def twin(weight: torch.Tensor, moments: Moments, spec: QuantSpec, damping: float) -> torch.Tensor:
    """W_hat by algorithm 1 in float64, one weight at a time: min-max scales in float32, fitted on updated weights."""
    rows, cols = weight.shape
    group = spec.granularity.cols or cols
    hessian = moments.hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    upper = torch.linalg.cholesky(inverse, upper=True)
    sensitivity = (1 / inverse.diagonal()).float()
    kept = find_outliers(weight, replace(spec, outliers=0.0), sensitivity, spec.count_outliers((rows, cols)))
    result = torch.zeros_like(weight)
    for i in range(rows):
        w = weight[i].double().tolist()
        for first in range(0, cols, group):
            part = [w[j] for j in range(first, first + group) if not kept[i, j]]
            low, high = min(0.0, *part), max(0.0, *part)
            scale = (high - low) / (spec.high - spec.low) or 1.0
            zero = min(max(round(spec.low - low / scale), spec.low), spec.high)
            for j in range(first, first + group):
                code = min(max(round(w[j] / scale + zero), spec.low), spec.high)
                value = w[j] if kept[i, j] else scale * (code - zero)
                result[i, j] = value
                e = (w[j] - value) / float(upper[j, j])
                for k in range(j, cols):
                    w[k] -= e * float(upper[j, k])
    return result


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_twin(bits, share):
    x, moments = layer(seed=bits)
    spec = QuantSpec(get_format(f"int{bits}"), per_group(8), "integer", outliers=share)
    q = SpQR(order="none", block=3).solve(x, spec, moments).q
    assert torch.allclose(q.dequantize(), twin(x, moments, spec, 0.01), atol=2e-3)


@LAWS
@given(specs(outliers=(0.0, 0.05, 0.3)), st.integers(0, 99), st.sampled_from(["act", "group", "none"]))
def test_every_spec(spec, seed, order):
    x, moments = layer(5, 21, seed)
    solver = SpQR(order=order)
    found = solver.solve(x, spec, moments)
    assert found.method == "spqr"
    assert found.q.spec == spec
    assert (found.q.outliers is None) == (spec.outliers == 0)
    if found.q.outliers is not None:
        assert found.q.outliers.values.numel() == spec.count_outliers((5, 21))
    assert bool(torch.isfinite(found.q.dequantize()).all())
    assert same(solver.solve(x, spec, moments).q, found.q)


def test_with_independent_inputs_it_is_round_to_nearest():
    x, _ = layer()
    spec = QuantSpec(get_format("int3"), per_group(8), "integer", outliers=0.05)
    q = SpQR(damping=0.0).solve(x, spec, Moments(torch.eye(32), 1)).q
    assert torch.equal(q.codes[~kept(q)], quantize(x, spec).codes[~kept(q)])
    assert torch.allclose(q.dequantize(), quantize(x, spec).dequantize(), atol=1e-3)


def kept(q) -> torch.Tensor:
    mask = torch.zeros(q.shape, dtype=torch.bool)
    mask[q.outliers.places] = True
    return mask


def test_outliers_and_feedback_each_help():
    losses = dict.fromkeys(("rtn", "spqr", "apart", "plain"), 0.0)
    for seed in range(6):
        x, moments = layer(24, 48, seed)
        spec = replace(int_weight(3, 16, asymmetric=True, scale=FP16), outliers=0.03)
        plain = replace(spec, outliers=0.0)
        for name, solver, one in (("rtn", "rtn", spec), ("spqr", "spqr", spec), ("apart", "gptq", spec),
                                  ("plain", "spqr", plain)):  # fmt: skip
            losses[name] += layer_error(x, get_solver(solver).solve(x, one, moments).q, moments.hessian)
    assert losses["spqr"] < 0.7 * losses["rtn"]
    assert losses["apart"] < 0.7 * losses["rtn"]
    assert losses["spqr"] < 0.9 * losses["plain"]


@pytest.mark.parametrize("granularity", [per_group(8), per_block(2, 16)], ids=str)
@pytest.mark.parametrize("order", ["act", "none"])
def test_rows_in_parts_change_no_more_than_the_last_bits_of_sums_do(granularity, order, monkeypatch):
    x, moments = layer(9, 32)
    spec = QuantSpec(get_format("int3"), granularity, "integer", outliers=0.05)
    whole = SpQR(order=order).solve(x, spec, moments).q
    monkeypatch.setattr("bitgrain.solvers.spqr._LANES", 4)
    parts = SpQR(order=order).solve(x, spec, moments).q
    assert torch.allclose(parts.dequantize(), whole.dequantize(), atol=1e-3)


def test_the_specs_of_the_paper_are_stored_and_read():
    spec = spqr_weight(3, 8, 4, 0.05)
    x, moments = layer(6, 64)
    q = SpQR().solve(x, spec, moments).q
    stored = StoredLayer("m.weight", "m", "m", "Linear", "linear", 6, 64, 1, False, torch.float16, Scheme("s", spec))
    layout = BitgrainLayout()
    assert layout.refusal(stored) is None
    tensors = layout.encode(stored, [q])
    assert {(t.name, t.dtype, t.shape) for t in layout.tensors(stored)} == {
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert tensors["m.weight.scale"].shape == (6, 3)  # 8 scales of 3 bits
    assert tensors["m.weight.zero"].shape == (6, 3)
    (back,) = layout.decode(stored, tensors.__getitem__)
    assert same(back, q)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    padding = 6 * 2 - 6 * 2 * 6 // 8  # each row of outer zeros, 2 of 3 bits, ends with a byte
    assert nbytes <= spec.count_bits((6, 64)) / 8 + padding


def test_errors_and_no_tokens():
    x, moments = layer()
    spec = replace(int_weight(4, 8), outliers=0.05)
    with pytest.raises(SchemeError, match="up_proj: spqr needs the second moments"):
        SpQR().solve(x, spec, name="up_proj")
    with pytest.raises(NumericsError, match="up_proj holds 1 NaN"):
        SpQR().solve(
            x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)), spec, moments, name="up_proj"
        )
    for settings in ({"order": "best"}, {"damping": 2.0}, {"block": 0}):
        with pytest.raises(SchemeError, match="spqr: "):
            get_solver({"name": "spqr", **settings})
    found = SpQR().solve(x, spec, Moments(torch.zeros(32, 32), 0))
    assert found.method == "rtn"
    assert found.notes == ("calibration sent it no tokens: rounded to nearest",)
    dead = moments.hessian.clone()
    dead[3] = dead[:, 3] = 0.0
    found = SpQR().solve(x, spec, Moments(dead, 10))
    assert "1 input channel is always zero" in found.notes[0]


def test_gptq_keeps_outliers_apart_exactly():
    x, moments = layer()
    spec = replace(int_weight(3, 8, scale=FP16), outliers=0.05)
    q = get_solver("gptq").solve(x, spec, moments).q
    assert q.outliers is not None
    places = q.outliers.places
    assert torch.equal(q.outliers.values, x[places].half())
    rest = x.clone()
    rest[places] -= q.outliers.values.float()
    dense = get_solver("gptq").solve(rest, replace(spec, outliers=0.0), moments).q
    assert torch.equal(dense.codes, q.codes)
