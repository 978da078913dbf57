"""A learned weight starts at its QTensor, what it commits is what it showed, and its gradients are the textbook's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, mxfp4, nvfp4, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.spec import int_weight
from bitgrain.tuning.learned import Learn, LearnedWeight, learned_weights
from random_specs import LAWS, same, specs

LEARN = st.builds(Learn, st.booleans(), st.sampled_from(["kept", "factor", "range"]), st.booleans(), st.booleans())


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1
    x[0, 0] = 1.5
    x[-1] = 0.0
    return x


def quantized(spec: QuantSpec, seed: int) -> tuple[torch.Tensor, QTensor]:
    """A weight, and codes of it that are not the nearest (as another solver's would be)."""
    x = weights(7, 20, seed)
    noise = torch.randn(7, 20, generator=torch.Generator().manual_seed(seed + 1)) * 0.03
    q = quantize(x, spec)
    return x, replace(q, codes=quantize(x + noise, spec, scale=q.scale, zero=q.offset).codes)


def draw_moves(view: LearnedWeight, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in view.parameters().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    view.project_()


@settings(LAWS, max_examples=80)
@given(specs(), LEARN, st.booleans(), st.integers(0, 2**31))
def test_it_starts_where_the_qtensor_is(spec: QuantSpec, learn: Learn, knows_weight: bool, seed: int):
    try:
        x, q = quantized(spec, seed)
    except NumericsError:  # a scale beyond its storage
        return
    view = LearnedWeight(q, learn, x if knows_weight else None)
    assert torch.equal(view.weight(), q.dequantize())
    assert same(view.commit(), q)


@pytest.mark.parametrize(("free", "moved"), [(False, 1), (True, 3)])
def test_free_weights_leave_the_cell_of_their_code(free: bool, moved: int):
    """Layer-by-layer distillation moves codes as far as it likes; half a step reaches the next one at most."""
    x = weights(6, 16)
    q = quantize(x, int_weight(4, 16))
    view = LearnedWeight(q, Learn(codes=True, scales="kept", free=free), x)
    assert view.offsets is not None
    with torch.no_grad():
        view.offsets.fill_(3.0)
    view.project_()
    found = view.commit()
    assert int((found.codes - q.codes).amax()) == moved
    assert int(found.codes.amax()) <= 7
    assert torch.equal(found.dequantize(), view.weight())


@settings(LAWS, max_examples=80)
@given(specs(), LEARN, st.sampled_from([0.01, 0.3, 5.0]), st.integers(0, 2**31))
def test_what_is_committed_is_what_was_shown(spec: QuantSpec, learn: Learn, size: float, seed: int):
    try:
        x, q = quantized(spec, seed)
    except NumericsError:
        return
    view = LearnedWeight(q, learn, x)
    draw_moves(view, seed, size)
    found = view.commit()
    assert torch.equal(found.dequantize(), view.weight())
    assert found.codes.dtype == q.codes.dtype
    values = spec.format.decode(found.codes)
    assert values.min() >= spec.low
    assert values.max() <= spec.high
    if not isinstance(found.scale, QTensor) and not isinstance(q.scale, QTensor):
        assert found.scale.dtype == q.scale.dtype


def test_offsets_move_a_code_by_one_at_most():
    x = weights(8, 64)
    q = quantize(x, int_weight(4, 32, asymmetric=True))
    view = LearnedWeight(q, Learn(codes=True, scales="kept"), x)
    draw_moves(view, 1, 10.0)
    change = view.commit().codes.int() - q.codes.int()
    assert change.abs().max() == 1
    assert 0.2 < change.ne(0).float().mean() < 0.6


def twin(x: list[float], v: list[float], low: float, high: float, bits: int) -> list[float]:
    """SignRound's equations 3 and 4 as written, for one asymmetric group: low and high multiply min and max."""
    least, most, top = min(*x, 0.0) * low, max(*x, 0.0) * high, 2**bits - 1
    s = (most - least) / top
    z = round(-least / s)
    return [s * (min(max(round(value / s + z + offset), 0), top) - z) for value, offset in zip(x, v, strict=True)]


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.8, 1.0), (1.0, 0.7), (0.9, 0.85)])
def test_ranges_and_offsets_are_those_of_signround(low: float, high: float):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(5)).double()
    # limits that lie on the grid, so that rounding the zero point moves nothing
    x[:, 0], x[:, 1] = -5.0, 10.0
    x[:, 2:] = x[:, 2:].clamp(-4.9, 9.9)
    offsets = torch.rand(6, 16, generator=torch.Generator().manual_seed(6)) - 0.5
    view = LearnedWeight(quantize(x.float(), int_weight(4, 16, asymmetric=True)), Learn(True, "range"), x.float())
    assert view.offsets is not None
    assert view.scales is not None
    assert view.lows is not None
    with torch.no_grad():
        view.offsets.copy_(offsets[:, None])
        view.scales.fill_(high - 1)
        view.lows.fill_(low - 1)
    expected = [twin(row.tolist(), v.tolist(), low, high, 4) for row, v in zip(x, offsets.double(), strict=True)]
    torch.testing.assert_close(view.weight().double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_gradients_are_those_of_learned_step_sizes():
    """LSQ (arXiv 1902.08153, equations 2 and 3): dw/dv = s inside; dw/ds = round(u) - u inside, the code outside."""
    x = torch.tensor([[0.26, -0.4, 0.9, 3.0]])
    spec = int_weight(3, 4)
    start = quantize(x, spec, scale=torch.tensor([[0.25]]))
    view = LearnedWeight(start, Learn(codes=True, scales="range"), x)
    view.weight().sum().backward()
    assert view.offsets is not None
    assert view.scales is not None
    assert view.offsets.grad is not None
    assert view.scales.grad is not None
    torch.testing.assert_close(view.offsets.grad[0, 0], torch.tensor([0.25, 0.25, 0.0, 0.0]))  # 0.9 / 0.25 is above 3
    u = x / 0.25
    by_step = torch.where((u >= -4) & (u <= 3), u.round() - u, u.clamp(-4, 3))
    torch.testing.assert_close(view.scales.grad[0, 0], 0.25 * by_step.sum())
    factor = LearnedWeight(start, Learn(codes=False, scales="factor"))
    factor.weight().sum().backward()
    assert factor.scales is not None
    assert factor.scales.grad is not None
    torch.testing.assert_close(factor.scales.grad[0, 0], start.dequantize().sum() / 4)  # 2 ** (1 - 3)


def test_negative_scales_stay_negative():
    spec = int_weight(4, 32, scale=FP16)
    q = quantize(weights(4, 64), spec)
    assert isinstance(q.scale, torch.Tensor)
    q = QTensor((-q.codes).clamp(min=-7), -q.scale, None, spec)
    view = LearnedWeight(q, Learn(scales="factor"))
    draw_moves(view, 0, 0.4)
    found = view.commit()
    assert isinstance(found.scale, torch.Tensor)
    assert (found.scale < 0).all()
    assert not torch.equal(found.scale, q.scale)
    assert torch.equal(found.dequantize(), view.weight())


def test_a_scale_never_overflows_its_storage():
    spec = int_weight(4, 32, scale=FP16)
    q = quantize(weights(2, 32), spec, scale=torch.full((2, 1), 60000.0, dtype=torch.float16))
    view = LearnedWeight(q, Learn(scales="factor"))
    assert view.scales is not None
    with torch.no_grad():
        view.scales.fill_(0.9 * 8)
    found = view.commit()
    assert isinstance(found.scale, torch.Tensor)
    assert found.scale.isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_step_of_a_scale_moves_the_end_of_the_grid_by_one_code(bits: int):
    q = quantize(weights(4, 64), int_weight(bits, 32))
    view = LearnedWeight(q, Learn(scales="factor"))
    assert view.scales is not None
    assert isinstance(q.scale, torch.Tensor)
    with torch.no_grad():
        view.scales.fill_(0.25)
    grown = view.commit().scale
    assert isinstance(grown, torch.Tensor)
    torch.testing.assert_close((grown - q.scale) * 2 ** (bits - 1), q.scale * 0.25, atol=0, rtol=1e-3)


def test_what_cannot_be_learned():
    x = weights(4, 64)
    nf4 = QuantSpec(get_format("nf4"), per_group(32), scale=FP16)
    assert set(LearnedWeight(quantize(x, nf4), Learn(True, "range", True), x).parameters()) == {"scales"}
    assert LearnedWeight(quantize(x, nvfp4()), Learn(True, "range", True), x).parameters() == {}
    assert LearnedWeight(quantize(x, mxfp4()), Learn(True, "factor", True), x).parameters() == {}
    real = QuantSpec(get_format("uint4"), per_group(32), zero_point="real", scale=FP16)
    assert set(LearnedWeight(quantize(x, real), Learn(False, "factor", True)).parameters()) == {"scales", "shifts"}
    start = {"a": quantize(x, nvfp4()), "b": quantize(x, nf4)}
    assert [name for name, _ in learned_weights(start, Learn())] == ["b"]
    with pytest.raises(SchemeError, match="'kept', 'factor' or 'range', not 'free'"):
        Learn(scales="free")  # type: ignore[arg-type]


def test_sparse_outliers_are_passed_over():
    spec = replace(int_weight(4, 32), outliers=0.05)
    q = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), spec)
    assert q.outliers is not None
    assert list(learned_weights({"w": q}, Learn(False, "factor"))) == []
