"""Blocks of 32 with plain scales: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (ggml-common.h, block_q4_0 and following).

A block is its scale d in float16, for _1 types m in float16 (x = d q + m: a minimum with the other sign), for five bits
the fifth bits of all codes in order, then the low four bits: codes 0 to 15 in low nibbles, 16 to 31 in high ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.blocks import BlockType, Parts, merge, repeated, spread, words
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.numerics.formats import FP16, IntFormat
from bitgrain.numerics.granularity import per_group
from bitgrain.numerics.packing import pack, unpack
from bitgrain.numerics.spec import QuantSpec

SIZE = 32


def nibbles(codes: Tensor) -> Tensor:
    """uint8 [n, 16] of codes [n, 32] below 16: the second half in high nibbles."""
    return merge(codes.reshape(-1, 1, 2, SIZE // 2), 4).view(-1, SIZE // 2)


def halves(pairs: Tensor) -> Tensor:
    """The same of codes that lie two in a byte, uint8 [n, 16], neighbours together."""
    first, second = words(pairs).unbind(1)
    low, high = repeated(0x0F), repeated(0xF0)
    even = (first & low) | ((second << 4) & high)
    odd = ((first >> 4) & low) | (second & high)
    even, odd = (one.view(torch.uint8).to(torch.int16) for one in (even, odd))
    return (odd << 8).bitwise_or_(even).view(torch.uint8).view(-1, SIZE // 2)


def unnibble(data: Tensor) -> Tensor:
    """The inverse of `nibbles`."""
    return spread(data.reshape(-1, 1, SIZE // 2), 2, 4).view(-1, SIZE)


def _negated(half: Tensor) -> Tensor:
    """float16 numbers with the other sign, as bytes [n, 2]."""
    return (words(half, torch.int16) ^ -0x8000).view(torch.uint8)


def _join(pairs: Tensor, scale: Tensor) -> Tensor:
    return _beside(scale, halves(pairs))


def _beside(*parts: Tensor) -> Tensor:
    """Parts of an even number of bytes, one after the other in each block."""
    return torch.cat([words(part, torch.int16) for part in parts], dim=1).view(torch.uint8)


def _split(blocks: Tensor) -> Parts:
    return [unnibble(blocks[:, 2:]), blocks[:, :2]]


def _join_minimum(pairs: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return _beside(scale, _negated(minimum), halves(pairs))


def _split_minimum(blocks: Tensor) -> Parts:
    return [unnibble(blocks[:, 4:]), blocks[:, :2], _negated(blocks[:, 2:4])]


def _five(codes: Tensor) -> list[Tensor]:
    """Fifth bits [n, 4], and low nibbles [n, 16]."""
    both = words(codes)
    low, high = both & repeated(15), (both >> 4) & repeated(1)
    return [pack(high.view(torch.uint8), 1, torch.uint8), nibbles(low.view(torch.uint8))]


def _from_five(data: Tensor) -> Tensor:
    """The inverse, of [n, 20]."""
    low, high = unnibble(data[:, 4:]), unpack(data[:, :4], 1, SIZE)
    return (low.view(torch.int64) | (high.view(torch.int64) << 4)).view(torch.uint8)


def _join_five(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, *_five(codes)], dim=1)


def _split_five(blocks: Tensor) -> Parts:
    return [_from_five(blocks[:, 2:]), blocks[:, :2]]


def _join_five_minimum(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return torch.cat([scale, _negated(minimum), *_five(codes)], dim=1)


def _split_five_minimum(blocks: Tensor) -> Parts:
    return [_from_five(blocks[:, 4:]), blocks[:, :2], _negated(blocks[:, 2:4])]


def _join_eight(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, codes ^ 0x80], dim=1)


def _split_eight(blocks: Tensor) -> Parts:
    return [blocks[:, 2:] ^ 0x80, blocks[:, :2]]


def _symmetric(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits), per_group(SIZE), scale=FP16)


def _with_minimum(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits, False), per_group(SIZE), zero_point="minimum", scale=FP16, minimum=FP16)


TYPES = (
    BlockType(STORAGES["Q8_0"], _symmetric(8), join=_join_eight, split=_split_eight),
    BlockType(STORAGES["Q4_0"], _symmetric(4), join=_join, split=_split, pairs=True),
    BlockType(STORAGES["Q4_1"], _with_minimum(4), join=_join_minimum, split=_split_minimum, pairs=True),
    BlockType(STORAGES["Q5_0"], _symmetric(5), join=_join_five, split=_split_five),
    BlockType(STORAGES["Q5_1"], _with_minimum(5), join=_join_five_minimum, split=_split_five_minimum),
)
