"""llama.cpp's types: their sizes, and scales and minima in super-blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, choose_scale, fake_quantize, per_group, quantize
from bitgrain.numerics.affine import store_zero
from bitgrain.numerics.formats import FP16, FP32
from bitgrain.numerics.gguf_types import GGUF_TYPES, block_size, fits_gguf, k_quant
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.nested import Products, search_nested
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import store_offset, store_scale
from bitgrain.numerics.ranges import MinMax
from random_specs import LAWS

# bytes of a block and how many weights it holds, as ggml-common.h has them
BLOCKS = {
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
    "Q2_K": (84, 256),
    "Q3_K": (110, 256),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
    "IQ4_NL": (18, 32),
    "IQ4_XS": (136, 256),
    "MXFP4": (17, 32),
    "TQ2_0": (66, 256),
}
NESTED = [name for name, spec in GGUF_TYPES.items() if isinstance(spec.scale, QuantSpec)]
MINIMA = [name for name, spec in GGUF_TYPES.items() if spec.minimum is not None]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_sizes_are_those_of_the_blocks(name: str):
    size, weights = BLOCKS[name]
    spec = GGUF_TYPES[name]
    assert spec.count_bits((3, 512)) == 8 * size * 3 * 512 // weights
    assert block_size(spec) == weights
    assert fits_gguf(spec, (7, 2 * weights))
    assert not fits_gguf(spec, (7, weights + 16))


def test_k_quants_of_other_bits_are_refused():
    with pytest.raises(SchemeError, match="k-quants have 2 to 6 bits, not 7"):
        k_quant(7)


@pytest.mark.parametrize("name", MINIMA)
def test_what_a_type_holds_is_found_again(name: str):
    q = quantize(normal(8, 512), GGUF_TYPES[name])
    assert q.offset is q.minimum
    again = quantize(q.dequantize(), q.spec, scale=q.scale, zero=q.offset)
    assert torch.equal(again.codes, q.codes)
    steps, lows = scale_values(q.scale), scale_values(q.offset)
    assert torch.equal(fake_quantize(normal(8, 512), q.spec, scale=steps, zero=lows), q.dequantize())


@pytest.mark.parametrize("name", MINIMA)
def test_learned_minima_have_the_gradient_of_what_is_clipped(name: str):
    x, q = normal(4, 256), quantize(normal(4, 256) * 0.3, GGUF_TYPES[name])
    lows = scale_values(q.offset).clone().requires_grad_()
    x.requires_grad_()
    fake_quantize(x, q.spec, scale=scale_values(q.scale), zero=lows).sum().backward()
    assert x.grad is not None
    assert lows.grad is not None
    beyond = to_tiles(x.grad == 0, q.spec.granularity).sum(dim=-1)
    assert bool((beyond > 0).any())
    assert torch.allclose(lows.grad, -beyond.to(torch.float32), atol=1e-4)


@settings(LAWS)
@given(st.sampled_from(NESTED), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_search_for_outer_scales_never_loses(name: str, seed: int, spread: float):
    spec = GGUF_TYPES[name]
    x = normal(4, 512, seed=seed) * torch.linspace(1, spread, 512)
    tiles, counts = to_tiles(x, spec.granularity), to_tiles(normal(4, 512, seed=seed + 1).square(), spec.granularity)
    ideal, zero = spec.range.scale(tiles, spec, counts)
    products = Products.of(tiles, counts, spec, ideal, zero)
    found, minimum = search_nested(spec, ideal, zero, products, "w")
    nearest = store_scale(ideal, spec)
    curve = products.wvv if zero is None else (products.wvv - products.slope * products.wv).clamp(min=0)

    def loss(scale: torch.Tensor | QTensor) -> float:
        return float(((scale_values(scale) - ideal).square() * curve).sum())

    assert isinstance(nearest, QTensor)
    assert loss(found) <= 1.01 * loss(nearest) + 1e-12  # factors that are tried do not hit 1 exactly
    assert bool((scale_values(found) != 0).all())
    assert (minimum is None) == (spec.minimum is None)


def test_a_super_block_of_one_large_tile_keeps_the_small_ones():
    x = normal(2, 256)
    x[:, 32:] *= 1e-3
    q = quantize(x, GGUF_TYPES["Q4_K"])
    assert bool((scale_values(q.scale) > 0).all())
    zeros = quantize(torch.zeros(2, 256), GGUF_TYPES["Q4_K"])
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 256))


def test_minima_below_zero_need_a_storage_with_a_sign():
    plain = QuantSpec(IntFormat(4, False), per_group(32), zero_point="minimum", scale=FP32, minimum=FP32)
    ideal, zero = torch.ones(1, 1), torch.full((1, 1), -3.0)
    kept = store_zero(zero, ideal, ideal, plain)
    nested = store_zero(zero, ideal, ideal, k_quant(4))
    assert kept is not None
    assert nested is not None
    assert float(kept) == -3
    assert float(nested) == 0


def test_minima_beyond_their_storage_are_named():
    spec = QuantSpec(IntFormat(4, False), per_group(32), zero_point="minimum", scale=FP32, minimum=FP16)
    with pytest.raises(NumericsError, match=r"proj: minima overflow float16 \(largest 1e\+06"):
        choose_scale(torch.full((1, 32), -1e6), spec, name="proj")
    assert store_offset(None, torch.ones(1, 1), torch.ones(1, 1), k_quant(3)) is None


def test_minima_of_minima_have_no_zero_points():
    inner = QuantSpec(IntFormat(6, False), per_group(8), zero_point="integer", scale=FP16)
    with pytest.raises(SchemeError, match="minima that are quantized themselves have no zero points"):
        QuantSpec(IntFormat(4, False), per_group(32), zero_point="minimum", scale=FP16, minimum=inner)


def test_specs_with_an_order_are_not_made():
    spec = QuantSpec(IntFormat(4), per_group(32), range=MinMax(), ordered=True)
    with pytest.raises(SchemeError, match="such files are read, not made"):
        quantize(normal(2, 64), spec)
