"""Blocks of 256 ternary codes with one float16 scale behind them: TQ1_0, TQ2_0 (ggml-common.h).

TQ2_0 has the codes of four groups of 32 in 32 bytes, twice. TQ1_0 has five codes a byte, the first one the highest
digit of a number t in base 3, which is stored as ceil(256 t / 243): multiplied by 3 again and again, each digit in turn
is what goes over 256. 32 bytes hold five groups of 32, 16 bytes five of 16, and 4 bytes the last 16 codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.checkpoints.gguf.blocks import BlockType, Parts, merge, spread, words
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.errors import CheckpointError
from bitgrain.numerics.formats import FP16, get_format
from bitgrain.numerics.granularity import per_group
from bitgrain.numerics.spec import QuantSpec

_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""First byte, bytes, and digits a byte of TQ1_0's three runs."""
_BYTES = 52
_LOW, _HIGH = 0x00FF00FF00FF00FF, 0x0300030003000300
"""Of 64-bit integers: the lower byte of every 16 bits, and the digit in the upper one."""


def _join_two(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([merge(codes.reshape(-1, 2, 4, 32), 2).view(-1, 64), scale], dim=1)


def _split_two(blocks: Tensor) -> Parts:
    codes = spread(blocks[:, :64].reshape(-1, 2, 32), 4, 2).view(-1, 256)
    if codes.numel() and int(codes.amax().item()) > 2:
        raise CheckpointError("a block of TQ2_0 has a code that is not ternary: damaged. Download it again.")
    return [codes, blocks[:, 64:]]


def _join_one(codes: Tensor, scale: Tensor) -> Tensor:
    number = _digits(codes, 0)
    for i in range(1, 5):
        number *= 3
        number += _digits(codes, i)
    # no product is near a whole number but 0: float32 rounds up rightly
    return torch.cat([(number.to(torch.float32) * (256 / 243)).ceil_().to(torch.uint8), scale], dim=1)


def _digits(codes: Tensor, i: int) -> Tensor:
    """uint8 [n, 52]: the `i`-th digit of each byte, 0 where a byte has fewer."""
    found: list[Tensor] = []
    position = 0
    for _, width, digits in _RUNS:
        first = position + i * width
        found.append(codes[:, first : first + width] if i < digits else codes.new_zeros(len(codes), width))
        position += digits * width
    return torch.cat(found, dim=1)


def _split_one(blocks: Tensor) -> Parts:
    codes = torch.empty(len(blocks), 256, dtype=torch.uint8)
    pairs = words(F.pad(blocks[:, :_BYTES], (0, -_BYTES % 8)))
    even, odd = pairs & _LOW, (pairs >> 8) & _LOW
    for i in range(5):
        even, odd = even * 3, odd * 3
        digit = (((even >> 8) & _LOW) | (odd & _HIGH)).view(torch.uint8)
        even &= _LOW
        odd &= _LOW
        position = 0
        for first, width, digits in _RUNS:
            if i < digits:
                start = position + i * width
                codes[:, start : start + width] = digit[:, first : first + width]
            position += digits * width
    return [codes, blocks[:, _BYTES:]]


_SPEC = QuantSpec(get_format("ternary"), per_group(256), scale=FP16)

TYPES = (
    BlockType(STORAGES["TQ2_0"], _SPEC, join=_join_two, split=_split_two),
    BlockType(STORAGES["TQ1_0"], _SPEC, join=_join_one, split=_split_one),
)
