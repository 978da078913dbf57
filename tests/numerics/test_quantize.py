import math
from dataclasses import replace
from itertools import pairwise

import pytest
import scalar_twin as twin
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrices, specs

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import (
    QTensor,
    QuantSpec,
    choose_scale,
    fake_quantize,
    get_format,
    mxfp4,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    quantize,
)
from bitgrain.numerics.formats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP16
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.packing import pack
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.spec import int_weight, nf4_double_quantized

EVERY = {
    "int4": int_weight(4, 8),
    "int4 asymmetric": int_weight(4, 8, asymmetric=True),
    "int3 real zero": QuantSpec(get_format("uint3"), per_group(8), zero_point="real", scale=FP16),
    "int8 restricted": QuantSpec(get_format("int8"), per_channel(), restricted=True, scale=BF16),
    "uint8": QuantSpec(get_format("uint8"), per_tensor(), zero_point="integer"),
    "fp8 block": QuantSpec(FP8_E4M3, per_block(4, 8)),
    "fp8 per tensor": QuantSpec(FP8_E4M3, per_tensor(), scale=FP16),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "nf4": QuantSpec(get_format("nf4"), per_group(8)),
    "nf4 double": nf4_double_quantized(8),
    "ternary": QuantSpec(get_format("ternary"), per_group(8)),
    "binary": QuantSpec(get_format("binary"), per_channel()),
    "int16": QuantSpec(get_format("int16"), per_channel()),
}
every_spec = pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY.keys())


def values(q: QTensor) -> torch.Tensor:
    return q.spec.format.decode(q.codes)


def spread(per_tile: torch.Tensor, q: QTensor) -> torch.Tensor:
    """One entry for each tile -> one for each element, in the tensor's shape."""
    rows, cols = q.spec.granularity.tile(q.shape)
    tiles = per_tile.unsqueeze(-1).expand(*per_tile.shape, rows * cols)
    return from_tiles(tiles, q.spec.granularity, q.shape)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(matrices(), specs())
def test_the_scalar_twin_agrees(x, spec):
    q = quantize(x, spec)
    tile = spec.granularity.tile(tuple(x.shape))
    v, scales, zeros, x_hat = twin.quantize(x.tolist(), spec.format.name, tile, spec.zero_point, spec.restricted)
    assert scale_values(q.scale).tolist() == scales
    if q.zero is not None:
        decoded = spec.format.decode(q.zero) if spec.zero_point == "integer" else q.zero
        assert decoded.tolist() == zeros
    assert values(q).tolist() == v
    assert q.dequantize().tolist() == x_hat


@given(matrices(), specs())
def test_quantizing_again_with_the_same_scale_changes_nothing(x, spec):
    q = quantize(x, spec)
    again = quantize(q.dequantize(), spec, scale=q.scale, zero=q.zero)
    assert torch.equal(values(again), values(q))
    if not isinstance(spec.format, type(FP8_E4M3)):  # -0 and 0 are two codes of one number
        assert torch.equal(again.codes, q.codes)


@every_spec
@pytest.mark.parametrize("seed", range(3))
def test_idempotence_for_every_storage(spec, seed):
    q = quantize(randn(6, 32, seed=seed), spec)
    again = quantize(q.dequantize(), spec, scale=q.scale, zero=q.zero)
    assert torch.equal(values(again), values(q))


@given(matrices(), specs(formats=("int3", "int4", "int8", "uint4")))
def test_error_is_at_most_half_a_step_inside_the_range(x, spec):
    q = quantize(x, spec)
    steps = spread(scale_values(q.scale), q).double()
    offset = 0.0 if q.zero is None else spread(q.zero.to(torch.float32), q).double()
    low, high = (spec.low - offset) * steps, (spec.high - offset) * steps
    inside = (x.double() >= low) & (x.double() <= high)
    slack = 1e-5 * steps + 1e-6 * x.abs()  # float32 arithmetic
    error = (q.dequantize().double() - x).abs()
    assert bool((error <= steps / 2 + slack)[inside].all())
    if spec.zero_point != "integer" and not (spec.symmetric and spec.low >= 0):
        assert bool(((x >= low - slack) & (x <= high + slack)).all())  # min-max clips nothing
    elif spec.zero_point == "integer":  # rounding the zero point moves the range by at most half a step
        assert bool((error <= steps + slack).all())


@given(matrices(max_rows=4, max_cols=8), st.sampled_from(["int4", "int8", "fp8_e4m3", "fp4_e2m1"]))
def test_finer_tiles_never_have_larger_scales(x, name):
    nested = [per_tensor(), per_channel(), per_group(4), per_group(2), per_group(1)]
    scales = []
    for granularity in nested:
        spec = QuantSpec(get_format(name), granularity)
        q = quantize(x, spec)
        zero_tiles = to_tiles(x, granularity).abs().amax(-1) == 0
        scales.append(spread(scale_values(q.scale).masked_fill(zero_tiles, 0.0), q))
    for coarse, fine in pairwise(scales):
        assert bool((fine <= coarse).all())


@given(matrices(), st.randoms(use_true_random=False), specs(formats=("int4", "uint4", "fp8_e4m3", "ternary")))
def test_permuted_rows_give_permuted_codes(x, random, spec):
    spec = replace(spec, granularity=per_group(3))
    order = list(range(x.shape[0]))
    random.shuffle(order)
    q, permuted = quantize(x, spec), quantize(x[order], spec)
    assert torch.equal(permuted.codes, q.codes[order])
    assert torch.equal(permuted.dequantize(), q.dequantize()[order])


@given(matrices(), specs(), st.integers(-10, 10))
def test_powers_of_two_scale_through(x, spec, exponent):
    assume(bool((x != 0).any()))
    q, scaled = quantize(x, spec), quantize(x * 2.0**exponent, spec)
    assert torch.equal(scaled.codes, q.codes)
    assert torch.equal(scaled.dequantize(), q.dequantize() * 2.0**exponent)


@every_spec
def test_zero_tiles_are_exact(spec):
    x = randn(8, 64)
    x[:4, :32] = 0
    q = quantize(torch.zeros(8, 64), spec)
    assert torch.equal(q.dequantize(), torch.zeros(8, 64))
    if spec.format.has_zero and isinstance(q.scale, torch.Tensor):
        assert torch.equal(scale_values(q.scale), torch.ones_like(scale_values(q.scale)))
    if spec.symmetric and spec.format.has_zero:
        assert torch.equal(quantize(x, spec).dequantize()[:4, :32], torch.zeros(4, 32))


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_is_quantize_then_dequantize(spec, dtype):
    x = randn(6, 40).to(dtype)  # cut tiles for some of the specs
    x[0] = 0
    expected, got = quantize(x, spec).dequantize(dtype), fake_quantize(x, spec)
    assert got.dtype == dtype
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(got.view(bits), expected.view(bits))


@every_spec
def test_layout_rank_and_dtype_do_not_matter(spec):
    x = randn(6, 32)
    q = quantize(x, spec)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert torch.equal(quantize(strided, spec).codes, q.codes)
    assert torch.equal(quantize(x.t().contiguous().t(), spec).codes, q.codes)
    assert torch.equal(quantize(x.view(2, 3, 32), spec).codes, q.codes.view(2, 3, 32))
    half = x.to(torch.bfloat16)
    assert torch.equal(quantize(half, spec).codes, quantize(half.float(), spec).codes)
    vector = quantize(x[0], spec)
    assert vector.shape == (32,)
    assert vector.dequantize().shape == (32,)
    assert quantize(torch.tensor(3.0), spec).shape == ()


@every_spec
def test_quantize_leaves_its_input_alone(spec):
    x = randn(6, 32)
    before = x.clone()
    q = quantize(x, spec)
    codes = q.codes.clone()
    q.dequantize()
    assert torch.equal(x, before)
    assert torch.equal(q.codes, codes)


@every_spec
def test_bits_are_counted_as_packed(spec):
    q = quantize(randn(8, 64), spec)

    def packed_bits(part: QTensor) -> int:
        bits = part.spec.format.bits
        count = pack(part.unsigned_codes().flatten(), bits).numel() * 32 if bits <= 8 else part.codes.numel() * bits
        if isinstance(part.scale, QTensor):
            count += packed_bits(part.scale)
        else:
            count += part.scale.numel() * part.scale.element_size() * 8
        if part.spec.zero_point == "integer":
            count += math.ceil(part.zero.numel() * bits / 8) * 8
        elif part.spec.zero_point == "real":
            count += part.zero.numel() * part.zero.element_size() * 8
        return count

    assert 0 <= packed_bits(q) - q.count_bits() < 64  # what is left over in the last words


@every_spec
def test_unsigned_codes_are_in_range(spec):
    q = quantize(randn(6, 32), spec)
    unsigned = q.unsigned_codes().to(torch.int64)
    assert bool(((unsigned >= 0) & (unsigned < 2**spec.format.bits)).all())
    assert torch.equal(unsigned - spec.format.code_offset, q.codes.to(torch.int64))


@pytest.mark.parametrize("spec", [int_weight(4, 8), QuantSpec(get_format("uint8"), per_tensor()), mxfp4()])
def test_nan_and_inf_are_named_and_counted(spec):
    x = randn(4, 32)
    x[0, 0], x[1, 1], x[2, 2] = math.nan, math.inf, -math.inf
    scale, zero = choose_scale(randn(4, 32), spec)
    message = r"layers\.3\.q_proj holds 1 NaN and 2 Inf among 128 elements"
    with pytest.raises(NumericsError, match=message):
        quantize(x, spec, name="layers.3.q_proj")
    with pytest.raises(NumericsError, match=message):
        quantize(x, spec, name="layers.3.q_proj", scale=scale, zero=zero)
    with pytest.raises(NumericsError, match=message):
        choose_scale(x, spec, name="layers.3.q_proj")
    x = torch.zeros(4, 32)
    x[3, 3] = -math.inf  # unsigned symmetric grids look at the positive side only
    with pytest.raises(NumericsError, match="0 NaN and 1 Inf"):
        quantize(x, spec)


def test_a_finite_sum_that_overflows_is_not_an_error():
    x = torch.full((4, 8), 3e38)
    q = quantize(x, QuantSpec(get_format("int8"), per_tensor(), restricted=True))
    assert torch.equal(q.codes, torch.full((4, 8), 127, dtype=torch.int8))


def test_empty_tensors():
    spec = int_weight(4)
    with pytest.raises(SchemeError, match=r"q_proj has no elements \(shape \(0, 8\)\)"):
        quantize(torch.zeros(0, 8), spec, name="q_proj")
    with pytest.raises(SchemeError, match="no elements"):
        choose_scale(torch.zeros(0, 8), spec)
    assert fake_quantize(torch.zeros(0, 8), spec).shape == (0, 8)


def test_given_scales_of_the_wrong_shape_are_errors():
    x, spec = randn(4, 8), int_weight(4, 4)
    with pytest.raises(SchemeError, match=r"scales of shape \(4, 1\) given, per_group\(4\) needs \(4, 2\)"):
        quantize(x, spec, scale=torch.ones(4, 1))
    with pytest.raises(SchemeError, match="no zero points given"):
        quantize(x, int_weight(4, 4, asymmetric=True), scale=torch.ones(4, 2))
    with pytest.raises(SchemeError, match="needs none"):
        quantize(x, spec, scale=torch.ones(4, 2), zero=torch.ones(4, 2))


def test_straight_through_gradient_of_x():
    spec = QuantSpec(get_format("int4"), per_tensor())
    x = torch.tensor([[-9.0, -7.6, -0.3, 0.2, 3.4, 7.2, 9.0]], requires_grad=True)
    fake_quantize(x, spec, scale=torch.tensor([[1.0]])).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1", "nf4"])
def test_gradient_of_the_scale_is_lsqs(name):
    # LSQ, arXiv 1902.08153, equation 3: round(v) - v inside, the clipped code outside
    spec = QuantSpec(get_format(name), per_tensor())
    x, step = randn(5, 7) * 6, torch.tensor([[1.3]], requires_grad=True)
    upstream = randn(5, 7, seed=1)
    (fake_quantize(x, spec, scale=step) * upstream).sum().backward()
    v = x / 1.3
    code = spec.format.round(v)
    inside = (v >= spec.low) & (v <= spec.high)
    expected = (torch.where(inside, code - v, code) * upstream).sum()
    assert step.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_match_finite_differences_where_rounding_is_frozen():
    # with round(v) - v held constant the function is smooth: s * (clamp(x / s + z) + constant - z)
    spec = QuantSpec(get_format("uint4"), per_tensor(), zero_point="real")
    x, step, zero = randn(4, 6).double() * 4, 0.71, 6.3

    def frozen(s: float, z: float) -> torch.Tensor:
        base = (x / step + zero).clamp(0, 15)
        return s * ((x / s + z).clamp(0, 15) + (base.round() - base) - z)

    s = torch.tensor([[step]], requires_grad=True)
    z = torch.tensor([[zero]], requires_grad=True)
    fake_quantize(x.float(), spec, scale=s, zero=z).sum().backward()
    h = 1e-6
    by_scale = (frozen(step + h, zero) - frozen(step - h, zero)).sum() / (2 * h)
    by_zero = (frozen(step, zero + h) - frozen(step, zero - h)).sum() / (2 * h)
    assert s.grad.item() == pytest.approx(by_scale.item(), rel=1e-3, abs=1e-3)
    assert z.grad.item() == pytest.approx(by_zero.item(), rel=1e-3, abs=1e-3)


def test_a_zero_outside_the_scales_storage_is_refused():
    with pytest.raises(SchemeError, match="e8m0"):
        QuantSpec(get_format("uint4"), per_group(8), zero_point="real", scale=E8M0)
    with pytest.raises(SchemeError, match="symmetric int1"):
        QuantSpec(get_format("int1"), per_group(8))
    with pytest.raises(SchemeError, match="restricted"):
        QuantSpec(FP4_E2M1, per_group(8), restricted=True)
