"""The types of llama.cpp's GGUF files as QuantSpecs (ggml-common.h), with ranges that look at how much a weight counts.

Their storage is what it is: a checkpoint's dtype does not change it.
"""

from __future__ import annotations

from dataclasses import replace

from bitgrain.errors import SchemeError
from bitgrain.numerics.formats import FP16, IntFormat, get_format
from bitgrain.numerics.granularity import matrix_shape, per_group
from bitgrain.numerics.ranges.weighted import Weighted
from bitgrain.numerics.spec import QuantSpec, mxfp4


def k_quant(bits: int) -> QuantSpec:
    """Q2_K to Q6_K: super-blocks of 256 weights, whose tiles have integer scales under one float16 scale.

    Q2_K, Q4_K and Q5_K have minima, stored likewise; Q3_K and Q6_K are symmetric, their scales have signs.
    Raises SchemeError for other bits.
    """
    match bits:
        case 2 | 4 | 5:
            nested = _nested(4, 16) if bits == 2 else _nested(6, 8)
            codes, tile = IntFormat(bits, is_signed=False), per_group(16 if bits == 2 else 32)
            return QuantSpec(codes, tile, zero_point="minimum", scale=nested, minimum=nested)
        case 3 | 6:
            return QuantSpec(IntFormat(bits), per_group(16), scale=_nested(6 if bits == 3 else 8, 16, signed=True))
        case _:
            raise SchemeError(f"k-quants have 2 to 6 bits, not {bits}")


def plain_block(bits: int, *, minima: bool = False) -> QuantSpec:
    """Q4_0, Q5_0 and Q8_0, and with minima Q4_1 and Q5_1: blocks of 32 with float16 scales."""
    if minima:
        codes = IntFormat(bits, is_signed=False)
        return QuantSpec(codes, per_group(32), zero_point="minimum", scale=FP16, minimum=FP16)
    return QuantSpec(IntFormat(bits), per_group(32), scale=FP16)


def _nested(bits: int, tiles: int, *, signed: bool = False) -> QuantSpec:
    return QuantSpec(IntFormat(bits, is_signed=signed), per_group(tiles), scale=FP16)


GGUF_TYPES: dict[str, QuantSpec] = {
    name: spec if name == "MXFP4" else replace(spec, range=Weighted())
    for name, spec in {
        "Q4_0": plain_block(4),
        "Q4_1": plain_block(4, minima=True),
        "Q5_0": plain_block(5),
        "Q5_1": plain_block(5, minima=True),
        "Q8_0": plain_block(8),
        "Q2_K": k_quant(2),
        "Q3_K": k_quant(3),
        "Q4_K": k_quant(4),
        "Q5_K": k_quant(5),
        "Q6_K": k_quant(6),
        "IQ4_NL": QuantSpec(get_format("iq4_nl"), per_group(32), scale=FP16),
        "IQ4_XS": QuantSpec(get_format("iq4_nl"), per_group(32), scale=_nested(6, 8, signed=True)),
        "MXFP4": mxfp4(),
        "TQ2_0": QuantSpec(get_format("ternary"), per_group(256), scale=FP16),
    }.items()
}


def block_size(spec: QuantSpec) -> int:
    """How many weights of a row a block of one of these types has: they must divide its inputs."""
    tile = spec.granularity.cols or 1
    return tile * (spec.scale.granularity.cols or 1) if isinstance(spec.scale, QuantSpec) else tile


def fits_gguf(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` [.., out, in] can be stored as one of these types."""
    return matrix_shape(shape)[1] % block_size(spec) == 0
