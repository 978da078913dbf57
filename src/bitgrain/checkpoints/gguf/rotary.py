"""Where llama.cpp and transformers differ in rotary embeddings: the order of rows, and factors of frequencies.

llama.cpp rotates neighbouring rows of a head's queries and keys in the architecture `llama`, transformers rows that are
half a head apart: the same function, with the rows of q_proj and k_proj in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """int64 [rows]: which row of q_proj or k_proj each row of the GGUF tensor is. Raises ValueError."""
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows are not {heads} heads of an even size")
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def halved_rows(rows: int, heads: int) -> Tensor:
    """int64 [rows]: the inverse of `interleaved_rows`."""
    return torch.argsort(interleaved_rows(rows, heads))


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: by what llama.cpp divides each frequency (transformers' `rope_type: llama3`)."""
    base, factor, context = (float(rope[key]) for key in ("rope_theta", "factor", "original_max_position_embeddings"))
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    inverse = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    waves = 2 * math.pi / inverse
    smooth = (context / waves - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(waves > context / low, factor, mixed)
    return torch.where(waves < context / high, 1.0, factors).to(torch.float32)


def llama3_rope(factors: Tensor, theta: float) -> dict[str, Any] | None:
    """The inverse, for scalings with the frequencies of Llama 3.1 (1 and 4); None for others."""
    for context in _CONTEXTS:
        rope: dict[str, Any] = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        if torch.allclose(llama3_factors(rope, 2 * len(factors)), factors, rtol=1e-5, atol=0.0):
            return rope
    return None
