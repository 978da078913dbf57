"""The two rewrites that all transforms are made of: rescaling the channels of a pair, and mixing the rows of a head."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitgrain.transforms.base import Pair


def matrix_of(module: nn.Module, name: str, transposed: bool) -> Tensor:
    """A view [.., out, in] of a parameter; writing to it changes the parameter."""
    data = module.get_parameter(name).data
    return data.mT if transposed else data


def reader_of(module: nn.Module, pair: Pair, name: str) -> Tensor:
    """A view [.., out, in] of one of the pair's matrices."""
    return matrix_of(module, name, name in pair.transposed)


def writer_rows(pair: Pair, device: torch.device) -> Tensor:
    """int64 [width]: the rows of the writer that belong to the pair."""
    step = torch.arange(pair.width, device=device)
    if pair.span == 0:
        return step + pair.start
    return pair.start + step // pair.span * pair.stride + step % pair.span


def to_columns(pair: Pair, channels: Tensor) -> Tensor:
    """[.., width] -> [.., width x repeats]: the value that each column of the readers has."""
    if pair.repeats == 1:
        return channels
    heads = channels.unflatten(-1, (-1, 1, pair.head))
    return heads.expand(*heads.shape[:-2], pair.repeats, pair.head).flatten(-3)


def to_channels(pair: Pair, columns: Tensor) -> Tensor:
    """[.., width x repeats] -> [.., repeats, width]: the columns that belong to each channel."""
    if pair.repeats == 1:
        return columns.unsqueeze(-2)
    return columns.unflatten(-1, (-1, pair.repeats, pair.head)).transpose(-2, -3).flatten(-2)


def bias_of(module: nn.Module, weight: str) -> str:
    """The name of the bias that is added to the product with a matrix: [out], or [experts, out] for stacks."""
    owner, _, leaf = weight.rpartition(".")
    parameter = module.get_parameter(weight)
    part = module.get_submodule(owner)
    for name, other in part.named_parameters(recurse=False):
        stacked = parameter.ndim == 3 and name.startswith(leaf) and other.ndim == 2 and len(other) == len(parameter)
        if (name == "bias" and leaf == "weight") or (stacked and "bias" in name):
            return f"{owner}.{name}" if owner else name
    return ""


def names_of(pair: Pair) -> list[str]:
    """All parameters that the pair's rewrites touch."""
    own = [pair.gain] if pair.kind == "norm" else [pair.writer]
    return [*own, *([pair.bias] if pair.bias else []), *pair.readers]


@torch.no_grad()
def rescale(module: nn.Module, pair: Pair, factors: Tensor) -> None:
    """Multiply the readers' columns by `factors` and divide the writer by them, in place.

    factors  positive float32 [width]; for a stack of experts also [experts, width]
    """
    if pair.kind == "norm":
        gain = module.get_parameter(pair.gain).data
        gain.copy_((gain + pair.offset) / factors - pair.offset)
        if pair.bias:
            module.get_parameter(pair.bias).data.div_(factors)
    else:
        rows = writer_rows(pair, factors.device)
        weight = reader_of(module, pair, pair.writer)
        weight[..., rows, :] = weight[..., rows, :] / factors.unsqueeze(-1)
        if pair.bias:
            bias = module.get_parameter(pair.bias).data
            bias[..., rows] = bias[..., rows] / factors
    columns = to_columns(pair, factors).unsqueeze(-2)
    for name in pair.readers:
        reader_of(module, pair, name).mul_(columns)


@torch.no_grad()
def mix_heads(module: nn.Module, pair: Pair, matrices: Tensor) -> None:
    """Multiply the outputs of each head of the writer by an orthogonal matrix, and undo it in the readers, in place.

    matrices  float32 [heads of the writer, head, head]; for a row vector y of a head, y becomes y @ matrix
    """
    rows = writer_rows(pair, matrices.device)
    weight = reader_of(module, pair, pair.writer)
    heads = weight[rows].unflatten(0, (-1, pair.head))
    weight[rows] = (matrices.mT @ heads).flatten(0, 1)
    if pair.bias:
        bias = module.get_parameter(pair.bias).data
        bias[rows] = (bias[rows].view(-1, 1, pair.head) @ matrices).flatten()
    for name in pair.readers:
        weight = reader_of(module, pair, name)
        columns = weight.unflatten(-1, (len(matrices), pair.repeats, pair.head))
        weight.copy_(torch.einsum("ogrh,ghk->ogrk", columns, matrices).flatten(1))


@contextmanager
def restoring(module: nn.Module, names: Iterable[str]) -> Generator[None]:
    """Afterwards these parameters have the bits that they had before."""
    saved = {name: module.get_parameter(name).data.clone() for name in names}
    try:
        yield
    finally:
        for name, value in saved.items():
            module.get_parameter(name).data.copy_(value)
