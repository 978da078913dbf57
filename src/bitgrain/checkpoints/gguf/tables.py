"""Blocks of four-bit codes that a table gives meaning: IQ4_NL, IQ4_XS, MXFP4, NVFP4 (ggml-common.h).

IQ4_NL is a float16 scale and 32 codes; IQ4_XS is 256 of them with quantized scales: d, the upper two bits of eight
scales, their low nibbles, the codes group by group. MXFP4 is a scale in E8M0 and 32 codes of E2M1; NVFP4 is four
scales in E4M3, without a sign, and 4 x 16 codes of E2M1. The first half of every group is in the low nibbles.

ggml reads MXFP4's scale 255, NaN in the MX specification, as 2**128, and NVFP4's 127, NaN as well, as 0; both are
refused here, as are the signs of NVFP4's scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.checkpoints.gguf.blocks import BlockType, Parts, merge, spread
from bitgrain.checkpoints.gguf.legacy import halves, unnibble
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.errors import CheckpointError
from bitgrain.numerics.formats import FP4_E2M1, FP8_E4M3, FP16, IntFormat, get_format
from bitgrain.numerics.granularity import per_group
from bitgrain.numerics.packing import pack, unpack
from bitgrain.numerics.spec import QuantSpec, mxfp4

_MX_LARGEST, _NV_LARGEST = 254, 126
"""The largest byte of a scale."""


def _join_plain(pairs: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, halves(pairs)], dim=1)


def _split_nl(blocks: Tensor) -> Parts:
    return [unnibble(blocks[:, 2:]), blocks[:, :2]]


def _split_mx(blocks: Tensor) -> Parts:
    _refuse(blocks[:, :1], _MX_LARGEST, "MXFP4")
    return [unnibble(blocks[:, 1:]), blocks[:, :1]]


def _join_xs(codes: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    high, low = pack(scale >> 4, 2, torch.uint8), pack(scale & 15, 4, torch.uint8)
    return torch.cat([outer, high, low, merge(codes.reshape(-1, 8, 2, 16), 4).view(-1, 128)], dim=1)


def _split_xs(blocks: Tensor) -> Parts:
    high, low = unpack(blocks[:, 2:4], 2, 8), unpack(blocks[:, 4:8], 4, 8)
    codes = spread(blocks[:, 8:].reshape(-1, 8, 16), 2, 4).view(-1, 256)
    return [codes, low | (high << 4), blocks[:, :2]]


def _join_nv(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([scale, merge(codes.reshape(-1, 4, 2, 8), 4).view(-1, 32)], dim=1)


def _split_nv(blocks: Tensor) -> Parts:
    _refuse(blocks[:, :4], _NV_LARGEST, "NVFP4")
    return [spread(blocks[:, 4:].reshape(-1, 4, 8), 2, 4).view(-1, 64), blocks[:, :4]]


def _refuse(scales: Tensor, largest: int, name: str) -> None:
    if scales.numel() and int(scales.amax().item()) > largest:
        raise CheckpointError(f"a block of {name} has a scale that is not a number: damaged. Download it again.")


_NL = get_format("iq4_nl")

TYPES = (
    BlockType(STORAGES["IQ4_NL"], QuantSpec(_NL, per_group(32), scale=FP16), None, _join_plain, _split_nl, pairs=True),
    BlockType(
        STORAGES["IQ4_XS"],
        QuantSpec(_NL, per_group(32), scale=QuantSpec(IntFormat(6), per_group(8), scale=FP16)),
        join=_join_xs,
        split=_split_xs,
    ),
    BlockType(STORAGES["MXFP4"], mxfp4(), join=_join_plain, split=_split_mx, pairs=True, largest_scale=_MX_LARGEST),
    BlockType(
        STORAGES["NVFP4"],
        QuantSpec(FP4_E2M1, per_group(16), scale=FP8_E4M3),
        join=_join_nv,
        split=_split_nv,
        largest_scale=_NV_LARGEST,
    ),
)
