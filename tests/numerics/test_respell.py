"""A QTensor said otherwise holds the same numbers, or is refused."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import plan_respelling, respell, respell_packed
from bitgrain.numerics.spec import int_weight, nvfp4
from random_layers import random_layer, random_matrix

WEIGHT = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))


def same(q: QTensor, spec: QuantSpec) -> QTensor:
    found = respell(q, spec)
    assert found.spec == spec
    assert torch.equal(found.dequantize(), q.dequantize())
    return found


def test_symmetric_codes_get_zero_points_and_lose_them_again():
    q = quantize(WEIGHT, int_weight(4, 32, scale=FP16))
    asymmetric = same(q, int_weight(4, 32, asymmetric=True, scale=FP16))
    assert asymmetric.zero is not None
    assert not asymmetric.zero.any()
    assert torch.equal(same(asymmetric, q.spec).codes, q.codes)


def test_unsigned_codes_are_signed_ones_with_another_zero_point():
    q = quantize(WEIGHT, int_weight(4, 32, asymmetric=True, scale=FP16))
    unsigned = same(q, replace(q.spec, format=IntFormat(4, is_signed=False)))
    assert torch.equal(unsigned.codes.to(torch.int8) - 8, q.codes)
    assert torch.equal(same(unsigned, q.spec).codes, q.codes)


def test_fewer_bits_fit_into_more():
    q = quantize(WEIGHT, int_weight(3, 32))
    assert torch.equal(same(q, int_weight(8, 32)).codes, q.codes)
    with pytest.raises(SchemeError, match="does not have all numbers"):
        respell(quantize(WEIGHT, int_weight(8, 32)), int_weight(4, 32))


def test_tiles_are_split_and_joined_where_their_scales_are_equal():
    q = quantize(WEIGHT, QuantSpec(IntFormat(8), per_channel()))
    groups = same(q, QuantSpec(IntFormat(8), per_group(16)))
    assert torch.equal(same(groups, q.spec).scale, q.scale)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="differ inside the tiles"):
        respell(q, QuantSpec(IntFormat(8), per_tensor()))
    ragged = quantize(WEIGHT[:, :40], QuantSpec(IntFormat(8), per_group(32)))  # the last tile has 8 columns
    same(replace(ragged, scale=torch.ones(12, 2)), QuantSpec(IntFormat(8), per_channel()))
    with pytest.raises(SchemeError, match="cross"):
        respell(quantize(WEIGHT[:, :48], int_weight(4, 16)), int_weight(4, 24))


def test_scales_that_the_storage_lacks_are_named():
    with pytest.raises(SchemeError, match="scales are not all numbers of float16"):
        respell(quantize(WEIGHT, int_weight(4, 32, scale=FP32)), int_weight(4, 32, scale=FP16))
    same(quantize(WEIGHT, int_weight(4, 32, scale=BF16)), int_weight(4, 32, scale=FP32))


def test_zero_points_become_minima_and_back():
    q = quantize(WEIGHT, int_weight(4, 32, asymmetric=True, scale=FP16))
    minima = replace(q.spec, zero_point="minimum", minimum=FP32)
    found = same(q, minima)
    assert found.minimum is not None
    assert torch.equal(same(found, q.spec).codes, q.codes)


def test_an_order_is_kept_or_refused():
    q = quantize(WEIGHT, int_weight(4, 32, scale=FP16))
    ordered = same(q, replace(q.spec, ordered=True))
    same(ordered, q.spec)
    shuffled = replace(ordered, order=torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32))
    assert torch.equal(shuffled.dequantize()[:, shuffled.order.long()], q.dequantize())  # type: ignore[union-attr]
    with pytest.raises(SchemeError, match="act-order"):
        respell(shuffled, q.spec)


def test_nested_scales_stay_or_become_plain():
    q = quantize(WEIGHT, nvfp4())
    same(q, q.spec)
    same(q, replace(q.spec, scale=FP32))


def other_specs(rng: random.Random, spec: QuantSpec) -> QuantSpec:
    """`spec` with other integers, zero points, storage or tiles."""
    zero = rng.choice(["none", "integer", "minimum", "real"])
    scale = rng.choice([spec.scale, FP16, BF16, FP32])
    integers = [IntFormat(bits, signed) for bits in (spec.format.bits, 4, 8) for signed in (True, False)]
    format = rng.choice(integers) if isinstance(spec.format, IntFormat) else spec.format
    granularity = rng.choice([spec.granularity, per_group(16), per_group(32), per_channel()])
    if zero == "integer" and not isinstance(format, IntFormat):
        zero = "none"
    return replace(
        spec,
        format=format,
        granularity=granularity,
        zero_point=zero,
        scale=scale,
        minimum=rng.choice([scale, FP32]) if zero == "minimum" else None,
        restricted=False,
        ordered=granularity.cols is not None and rng.random() < 0.3,
    )


def test_what_is_proven_from_scales_alone_is_so_when_compared():
    rng, seen = random.Random(0), Counter[str]()
    while seen["proven"] < 400 or seen["stays"] < 100 or seen["crossed"] < 100:
        q = random_matrix(rng, random_layer(rng))
        try:
            spec = other_specs(rng, q.spec)
            how = plan_respelling(q, spec)
        except SchemeError:
            continue
        if not how.proven:
            continue
        found = respell(q, spec)
        assert torch.equal(found.dequantize(), q.dequantize()), (q.spec, spec)
        again = respell_packed(PackedMatrix.of(q), spec)
        assert torch.equal(again.unpack().codes, found.codes)
        if how.stays:
            assert torch.equal(found.unsigned_codes(), q.unsigned_codes())
        seen += Counter(proven=1, stays=how.stays, crossed="minimum" in (q.spec.zero_point, spec.zero_point))


def test_products_that_float32_rounds_are_compared():
    """With scales of 24 bits, s * 15 - s * 8 is not s * 7."""
    q = quantize(WEIGHT, int_weight(4, 32, asymmetric=True, scale=FP32))
    minima = replace(q.spec, format=IntFormat(4, False), zero_point="minimum", minimum=FP32)
    assert not plan_respelling(q, minima).proven
    with pytest.raises(SchemeError, match="rounds these numbers differently"):
        respell(q, minima)
