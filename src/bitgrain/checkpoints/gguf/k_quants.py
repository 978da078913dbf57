"""Super-blocks of 256 whose scales are quantized themselves: Q2_K to Q6_K (ggml-common.h, block_q2_K and following).

Codes lie in planes: Q4_K and Q5_K have the codes of two neighbouring groups of 32 in the nibbles of 32 bytes; Q2_K and
Q3_K, and the upper two bits of Q6_K, those of four groups in 32 bytes; fifth and third bits those of all eight groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.checkpoints.gguf.blocks import BlockType, Parts, merge, repeated, spread, words
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.numerics.formats import FP16, IntFormat
from bitgrain.numerics.granularity import per_group
from bitgrain.numerics.spec import QuantSpec

SIZE = 256


def _field(data: Tensor, shift: int, bits: int) -> Tensor:
    """uint8 of the same shape: `bits` bits from bit `shift` on of every byte. Rows are multiples of 8 bytes."""
    return (words(data) >> shift).bitwise_and_(repeated(2**bits - 1)).view(torch.uint8)


def _either(low: Tensor, high: Tensor, shift: int) -> Tensor:
    """low | high << shift, byte by byte, [n, 256]."""
    return (words(high) << shift).bitwise_or_(words(low)).view(torch.uint8)


def _planes(codes: Tensor, halves: int, bits: int) -> Tensor:
    """uint8 [n, 32 bits]: `halves` times 8 / `bits` groups, each in bits of their own of the same bytes."""
    return merge(codes.reshape(len(codes), halves, 8 // bits, -1), bits).view(len(codes), -1)


def _unplane(data: Tensor, halves: int, bits: int) -> Tensor:
    """The inverse of `_planes`: [n, 256]."""
    return spread(data.reshape(len(data), halves, -1), 8 // bits, bits).view(len(data), SIZE)


# Q2_K: scales and minima [16] in nibbles of one byte each, codes [64], d, dmin


def _join_q2(codes: Tensor, scale: Tensor, outer: Tensor, minimum: Tensor, outer_minimum: Tensor) -> Tensor:
    scales = merge(torch.stack([scale, minimum], dim=1).unsqueeze(1), 4).view(-1, 16)
    return torch.cat([scales, _planes(codes, 2, 2), outer, outer_minimum], dim=1)


def _split_q2(blocks: Tensor) -> Parts:
    scales = spread(blocks[:, None, :16], 2, 4)[:, 0]
    codes = _unplane(blocks[:, 16:80], 2, 2)
    return [codes, scales[:, 0], blocks[:, 80:82], scales[:, 1], blocks[:, 82:84]]


# Q3_K: third bits [32], low bits [64], scales [12] of six bits, d. The low nibbles of scales 0 to 7 and 8 to 15 share
# eight bytes; the upper two bits of scales i, i + 4, i + 8, i + 12 share a byte.


def _join_q3(codes: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    high, low = _field(codes, 2, 1), _field(codes, 0, 2)
    first, second = words(scale).split(1, dim=1)
    four, two = repeated(0x0F), repeated(0x03)
    lows = (first & four) | ((second & four) << 4)
    uppers = ((first >> 4) & two) | (((second >> 4) & two) << 4)  # below 2**62
    uppers |= uppers >> 30
    scales = [lows.view(torch.uint8), uppers.view(torch.uint8)[:, :4]]
    return torch.cat([_planes(high, 1, 1), _planes(low, 2, 2), *scales, outer], dim=1)


def _split_q3(blocks: Tensor) -> Parts:
    high, low = _unplane(blocks[:, :32], 1, 1), _unplane(blocks[:, 32:96], 2, 2)
    lows, uppers = words(F.pad(blocks[:, 96:108], (0, 4))).split(1, dim=1)
    uppers = uppers | ((uppers & -4) << 30)
    four, two = repeated(0x0F), repeated(0x03)
    first = (lows & four) | ((uppers & two) << 4)
    second = ((lows >> 4) & four) | (((uppers >> 4) & two) << 4)
    scales = torch.cat([first, second], dim=1).view(torch.uint8)
    return [_either(low, high, 2), scales, blocks[:, 108:110]]


# Q4_K and Q5_K: d, dmin, scales and minima [12] of six bits, for five bits the fifth ones [32], low nibbles [128]


def _scales_and_minima(scales: Tensor, minima: Tensor) -> Tensor:
    """uint8 [n, 12]: four scales, four minima, then the low nibbles of the other four of both; the upper two bits of
    these stand in the bytes of the first ones."""
    scale, more_scale = words(scales, torch.int32).unbind(1)
    least, more_least = words(minima, torch.int32).unbind(1)
    four, two = 0x0F0F0F0F, 0x30303030
    joined = [
        scale | ((more_scale & two) << 2),
        least | ((more_least & two) << 2),
        (more_scale & four) | ((more_least & four) << 4),
    ]
    return torch.stack(joined, dim=1).view(torch.uint8)


def _apart(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: scales and minima, each [n, 8]."""
    first, second, third = words(data, torch.int32).unbind(1)
    six, four, two = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scales = [first & six, (third & four) | ((first >> 2) & two)]
    minima = [second & six, ((third >> 4) & four) | ((second >> 2) & two)]
    return torch.stack(scales, dim=1).view(torch.uint8), torch.stack(minima, dim=1).view(torch.uint8)


def _join_q4(codes: Tensor, scale: Tensor, outer: Tensor, minimum: Tensor, outer_minimum: Tensor) -> Tensor:
    return torch.cat(
        [outer, outer_minimum, _scales_and_minima(scale, minimum), _planes(codes, 4, 4)],
        dim=1,
    )


def _split_q4(blocks: Tensor) -> Parts:
    scales, minima = _apart(blocks[:, 4:16])
    return [_unplane(blocks[:, 16:], 4, 4), scales, blocks[:, :2], minima, blocks[:, 2:4]]


def _join_q5(codes: Tensor, scale: Tensor, outer: Tensor, minimum: Tensor, outer_minimum: Tensor) -> Tensor:
    high, low = _field(codes, 4, 1), _field(codes, 0, 4)
    head = [outer, outer_minimum, _scales_and_minima(scale, minimum)]
    return torch.cat([*head, _planes(high, 1, 1), _planes(low, 4, 4)], dim=1)


def _split_q5(blocks: Tensor) -> Parts:
    scales, minima = _apart(blocks[:, 4:16])
    codes = _either(_unplane(blocks[:, 48:], 4, 4), _unplane(blocks[:, 16:48], 1, 1), 4)
    return [codes, scales, blocks[:, :2], minima, blocks[:, 2:4]]


# Q6_K: low nibbles [128], upper two bits [64], scales [16] in eight bits, d


def _join_q6(codes: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    high, low = _field(codes, 4, 2), _field(codes, 0, 4)
    return torch.cat([_planes(low, 2, 4), _planes(high, 2, 2), scale ^ 0x80, outer], dim=1)


def _split_q6(blocks: Tensor) -> Parts:
    codes = _either(_unplane(blocks[:, :128], 2, 4), _unplane(blocks[:, 128:192], 2, 2), 4)
    return [codes, blocks[:, 192:208] ^ 0x80, blocks[:, 208:]]


def _symmetric(bits: int, scale_bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits), per_group(16), scale=QuantSpec(IntFormat(scale_bits), per_group(16), scale=FP16))


def _with_minimum(bits: int, group: int, scale_bits: int) -> QuantSpec:
    nested = QuantSpec(IntFormat(scale_bits, False), per_group(SIZE // group), scale=FP16)
    return QuantSpec(IntFormat(bits, False), per_group(group), zero_point="minimum", scale=nested, minimum=nested)


TYPES = (
    BlockType(STORAGES["Q6_K"], _symmetric(6, 8), join=_join_q6, split=_split_q6),
    BlockType(STORAGES["Q5_K"], _with_minimum(5, 32, 6), join=_join_q5, split=_split_q5),
    BlockType(STORAGES["Q4_K"], _with_minimum(4, 32, 6), join=_join_q4, split=_split_q4),
    BlockType(STORAGES["Q3_K"], _symmetric(3, 6), join=_join_q3, split=_split_q3),
    BlockType(STORAGES["Q2_K"], _with_minimum(2, 16, 4), join=_join_q2, split=_split_q2),
)
