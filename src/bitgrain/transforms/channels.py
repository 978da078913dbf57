"""What a rescaling transform asks of a pair: how large inputs and weights of each channel are, and which readers count.

Everything is [width], or [experts, width] where each expert has channels of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.numerics import QuantSpec
from bitgrain.transforms.base import BlockView, Pair
from bitgrain.transforms.rescale import reader_of, to_channels


def quantized_readers(block: BlockView, pair: Pair) -> list[str]:
    """Those readers that will be quantized: the only ones that gain from a rescaling."""
    return [name for name in pair.readers if name in block.specs]


def of_each_expert(module: nn.Module, pair: Pair) -> bool:
    """Whether the channels belong to one expert each: writer and reader are stacks."""
    return pair.kind == "linear" and module.get_parameter(pair.writer).ndim == 3


def input_size(block: BlockView, pair: Pair, measured: dict[str, Tensor], reduce: str) -> Tensor | None:
    """The inputs' size of each channel: `reduce` "max" or "mean" over columns that share a channel. None: not measured.

    measured  parameter -> [in] or [experts, in]
    """
    found = [measured[name].float() for name in pair.readers if name in measured]
    if not found:
        return None
    # readers of a norm share their input; a stack's experts see some of the tokens only, so others are preferred
    columns = min(found, key=lambda one: one.ndim)
    channels = to_channels(pair, columns)
    channels = channels.amax(-2) if reduce == "max" else channels.mean(-2)
    if of_each_expert(block.module, pair):
        return channels
    if channels.ndim == 1:
        return channels
    return channels.amax(0) if reduce == "max" else channels.mean(0)


def weight_absmax(block: BlockView, pair: Pair, readers: list[str]) -> Tensor:
    """Largest |w| in the columns of each channel."""
    parts: list[Tensor] = []
    for name in readers:
        channels = to_channels(pair, reader_of(block.module, pair, name).abs().amax(-2)).amax(-2)
        parts.append(channels if channels.ndim == 1 or of_each_expert(block.module, pair) else channels.amax(0))
    return torch.stack(parts).amax(0)


def weight_mean(block: BlockView, pair: Pair, readers: list[str]) -> Tensor:
    """Mean of |w| in the columns of each channel, each group of weights first divided by its largest |w|."""
    each = of_each_expert(block.module, pair)
    total: Tensor | None = None
    rows = 0
    for name in readers:
        weight = reader_of(block.module, pair, name)
        relative = _relative(weight.contiguous(), block.specs[name][0])
        channels = to_channels(pair, relative.sum(-2)).mean(-2)
        count = weight.shape[-2]
        if channels.ndim == 2 and not each:
            channels, count = channels.sum(0), count * len(channels)
        total, rows = channels if total is None else total + channels, rows + count
    assert total is not None
    return total / rows


def _relative(weight: Tensor, spec: QuantSpec) -> Tensor:
    """|w| divided by the largest of its tile."""
    stack = weight if weight.ndim == 3 else weight[None]
    parts: list[Tensor] = []
    for one in stack.abs():
        rows, cols = spec.granularity.tile(tuple(one.shape))
        if one.shape[0] % rows or one.shape[1] % cols:
            rows, cols = 1, one.shape[1]
        tiles = one.unflatten(0, (-1, rows)).unflatten(2, (-1, cols))
        parts.append((tiles / (tiles.amax((1, 3), keepdim=True) + 1e-6)).flatten(2).flatten(0, 1))
    return torch.stack(parts) if weight.ndim == 3 else parts[0]
