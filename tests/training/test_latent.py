"""Latent weights start where the codes are, are used as they will be written, and have LSQ's gradients."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, get_format, per_channel, per_group, quantize
from bitgrain.numerics.formats import BF16, FP16, FloatFormat
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.training.latent import FakeQuantizedParameter, FakeQuantizedWeight, latent_weight
from random_specs import LAWS, same, specs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(q: QTensor, seed: int) -> QTensor:
    """The same scales, with codes that a solver might have chosen instead of the nearest ones."""
    values = q.spec.format.grid()
    values = values[values >= q.spec.low]
    picks = torch.randint(len(values), q.shape, generator=torch.Generator().manual_seed(seed))
    codes = q.spec.format.encode(values[picks])
    return replace(q, codes=torch.where(random(*q.shape, seed=seed) > 1, codes, q.codes))


def told_apart(spec: QuantSpec) -> bool:
    """Behind a zero point float32 has no room for the finest numbers of a float format."""
    return spec.symmetric or not isinstance(spec.format, FloatFormat)


@LAWS
@given(spec=specs().filter(told_apart), seed=st.integers(0, 999))
def test_the_start_is_the_qtensor(spec: QuantSpec, seed: int):
    weight = random(8, 32, seed=seed)
    for start in (quantize(weight, spec), moved(quantize(weight, spec), seed)):
        view = FakeQuantizedWeight(start)
        for latent in (latent_weight(start), latent_weight(start, weight)):
            assert torch.equal(view(latent), start.dequantize())
            assert torch.equal(view.commit(latent).dequantize(), start.dequantize())


def test_weights_that_round_to_their_codes_stay_what_they_are():
    weight = random(4, 32)
    start = quantize(weight, QuantSpec(IntFormat(4), per_group(8)))
    steps = scale_values(start.scale).repeat_interleave(8, -1)
    inside = (weight / steps).clamp(start.spec.low, start.spec.high) * steps
    assert torch.allclose(latent_weight(start, weight), inside, rtol=1e-6)


@pytest.mark.parametrize("name", ["int3", "ternary", "fp4_e2m1"])
def test_gradients_are_those_of_lsq(name: str):
    """Equation 3 of the paper: round(v) - v inside the range, the end of the grid outside, times 1 / sqrt(N high)."""
    spec = QuantSpec(get_format(name), per_channel(), restricted=name == "int3")
    weight = 3 * random(3, 16)
    start = quantize(random(3, 16, seed=1), spec)
    view = FakeQuantizedWeight(start)
    weight.requires_grad_(True)
    upstream = random(3, 16, seed=2)
    view(weight).backward(upstream)
    assert view.scale is not None
    assert weight.grad is not None
    v = (weight / scale_values(start.scale)).detach()
    inside = (v >= spec.low) & (v <= spec.high)
    assert inside.any()
    assert not inside.all()
    by_scale = torch.where(inside, spec.format.round(v) - v, v.clamp(spec.low, spec.high))
    expected = (upstream * by_scale).sum(-1, keepdim=True) / (16 * spec.high) ** 0.5
    assert torch.allclose(view.scale.grad, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(weight.grad, torch.where(inside, upstream, 0.0), rtol=1e-5)


def test_learned_scales_and_zeros_are_used_as_they_are_stored():
    spec = QuantSpec(get_format("uint4"), per_group(8), zero_point="real", scale=FP16)
    weight = random(4, 16)
    view = FakeQuantizedWeight(quantize(weight, spec))
    with torch.no_grad():
        view.scale.mul_(1.0123)  # type: ignore[union-attr]
        view.zero.add_(0.0123)  # type: ignore[union-attr]
    q = view.commit(weight)
    assert q.scale.dtype == q.zero.dtype == torch.float16  # type: ignore[union-attr]
    assert torch.equal(view(weight), q.dequantize())


def test_a_scale_keeps_its_sign():
    q = quantize(random(2, 8), QuantSpec(IntFormat(2), per_channel(), scale=BF16))
    start = QTensor(q.codes, -q.scale, None, q.spec)  # type: ignore[operator]
    view = FakeQuantizedWeight(start)
    assert bool((view.steps() < 0).all())
    with torch.no_grad():
        view.scale.neg_()  # type: ignore[union-attr]
    assert torch.equal(view.steps(), scale_values(start.scale))


def test_sparse_outliers_are_refused():
    q = quantize(random(4, 32), QuantSpec(IntFormat(4), per_channel(), outliers=0.05))
    with pytest.raises(SchemeError, match="outliers"):
        FakeQuantizedWeight(q)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
def test_whole_parameters(transposed: bool, experts: int):
    spec = QuantSpec(IntFormat(4), per_group(8))
    matrices = [random(16, 8, seed=i) for i in range(experts)]
    parts = [quantize(matrix, spec) for matrix in matrices]
    stored = [matrix.T if transposed else matrix for matrix in matrices]
    parameter = torch.stack(stored) if experts > 1 else stored[0].contiguous()
    view = FakeQuantizedParameter(parts, transposed)
    found = view(parameter)
    assert found.shape == parameter.shape
    for one, part in zip(found if experts > 1 else [found], parts, strict=True):
        assert torch.equal(one.T if transposed else one, part.dequantize())
    assert all(same(a, b) for a, b in zip(view.commit(parameter), parts, strict=True))


def test_tiles_at_the_edge_are_cut():
    spec = QuantSpec(IntFormat(4), per_group(8))
    start = quantize(random(3, 12), spec)
    assert to_tiles(start.codes, spec.granularity).shape == (3, 2, 8)
    assert torch.equal(FakeQuantizedWeight(start)(latent_weight(start, random(3, 12))), start.dequantize())
