"""Densely packed rows of codes, as files hold them (`numerics.packing`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitgrain.errors import KernelError


def check_words(words: Tensor, bits: int, k: int) -> int:
    """Bytes from one row to the next of words [n, ...]; int32 and uint8 words are the same stream of bytes.

    Raises KernelError for another dtype, rows that do not lie whole in memory, or a wrong number of words.
    """
    if words.dtype not in (torch.uint8, torch.int32) or not 1 <= bits <= 8:
        raise KernelError(f"codes of 1 to 8 bits in uint8 or int32 words are read, not {bits} bits in {words.dtype}")
    needed = math.ceil(k * bits / (8 * words.element_size()))
    if words.ndim != 2 or words.shape[1] != needed or words.stride(1) != 1:
        raise KernelError(f"{k} codes of {bits} bits take rows of {needed} words, not {tuple(words.shape)}")
    return words.stride(0) * words.element_size()


def unpack_words(words: Tensor, bits: int, k: int) -> Tensor:
    """The unsigned codes, uint8 [n, k], of such rows: the readable way."""
    check_words(words, bits, k)
    stream = words.contiguous().view(torch.uint8)
    each = stream.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1  # the stream's bits, low ones first
    fields = each.flatten(1)[:, : k * bits].view(len(words), k, bits)
    return (fields << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
