"""The heads of a writer, found by what they do: columns of one head get the same sum over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitgrain.models.trace import Trace
from bitgrain.transforms.base import Pair
from bitgrain.transforms.rescale import mix_heads, names_of, reader_of, restoring, writer_rows

_EQUAL = 1e-5
"""Columns of one head differ by rounding only."""


def find_heads(block: nn.Module, pair: Pair, seen: Trace, again: Callable[[], Trace], same: Callable[[], bool]) -> Pair:
    """The pair with `head` and `mixes` filled in, proved; as it is where there is nothing to mix.

    again  runs the block with the weights that it has now; same: whether its output is what it was
    """
    x = seen.input_of(pair.readers[0])
    if x is None or block.get_parameter(pair.writer).ndim != 2:
        return pair
    size = pair.head or _head_size(block, pair, again)
    if size < 2 or pair.width % size:
        return pair
    tried = replace(pair, head=size, mixes=True)
    with restoring(block, names_of(pair)):
        mix_heads(block, tried, _random_rotations(pair.width // size, size, x.device))
        return tried if same() else pair


def _head_size(block: nn.Module, pair: Pair, again: Callable[[], Trace]) -> int:
    """With all rows of the writer equal, neighbouring columns of its reader differ where a head ends; 0: unknown."""
    rows = writer_rows(pair, block.get_parameter(pair.writer).device)
    with restoring(block, names_of(pair)):
        weight = reader_of(block, pair, pair.writer)
        weight[rows] = weight[rows[:1]]
        if pair.bias:
            bias = block.get_parameter(pair.bias).data
            bias[rows] = bias[rows[:1]]
        x = again().input_of(pair.readers[0])
    if x is None or not bool(x.any()):
        return 0
    change = (x[:, 1:] - x[:, :-1]).abs().amax(0) > _EQUAL * x.abs().max()
    return math.gcd(pair.width, *(int(place) + 1 for place in change.nonzero()))


def _random_rotations(count: int, size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    return q.float().to(device)
