"""What tiles of numbers lose under scales and zero points (native/solver/tile_search.h), for range searches.

x ~ s (v - z) with v = round(x / s + z) on a grid, see `kernels.grid`; x is divided by 1 where s is 0. Terms are float32
and computed as torch does it, one operation after the other; their sums are float64. The twin is
`numerics.ranges.search.tile_error`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import address_of, native


def tile_sums(
    x: Tensor, weights: Tensor | None, scale: Tensor, zero: Tensor | None, grid: Any, products: bool = False
) -> Tensor:
    """Of each tile the sum of w (x - s (v - z))^2 and, with `products`, of w v, w v v and w x v: float64 [1 or 4, t].

    x, weights [t, n] (weights None: all 1), scale, zero [t]: float32. Raises KernelError for other shapes.
    """
    x, weights, scale, zero = _checked(x, weights, scale.unsqueeze(0), None if zero is None else zero.unsqueeze(0))
    tiles, n = x.shape
    sums = torch.zeros(4 if products else 1, tiles, dtype=torch.float64)
    native().tile_sums(
        x.data_ptr(), address_of(weights), tiles, n, grid, scale.data_ptr(), address_of(zero), sums.data_ptr(),
        products, torch.get_num_threads(),
    )  # fmt: skip
    return sums


def best_candidates(
    x: Tensor, weights: Tensor | None, scale: Tensor, zero: Tensor | None, grid: Any, error: Tensor
) -> Tensor:
    """For each tile the first candidate with the smallest sum of w (x - s (v - z))^2, int64 [t].

    -1 where none is below `error`, float64 [t], which becomes the smallest. x, weights as of `tile_sums`; scale, zero
    float32 [candidates, t]. Raises KernelError for other shapes.
    """
    x, weights, scale, zero = _checked(x, weights, scale, zero)
    tiles, n = x.shape
    if error.dtype != torch.float64 or tuple(error.shape) != (tiles,) or not error.is_contiguous():
        raise KernelError(f"errors are float64 [{tiles}], not {error.dtype} {tuple(error.shape)}")
    best = torch.empty(tiles, dtype=torch.int32)
    native().best_candidates(
        x.data_ptr(), address_of(weights), tiles, n, grid, scale.data_ptr(), address_of(zero), scale.shape[0],
        error.data_ptr(), best.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return best.long()


def _checked(
    x: Tensor, weights: Tensor | None, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """All float32 and in one piece."""
    shape = (scale.shape[0], x.shape[0])
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise KernelError(f"scales and zero points of tiles {tuple(x.shape)} are [candidates, {x.shape[0]}]")
    if weights is not None and weights.shape != x.shape:
        raise KernelError(f"weights {tuple(weights.shape)} do not fit tiles {tuple(x.shape)}")
    return (
        _plain(x),
        None if weights is None else _plain(weights),
        _plain(scale),
        None if zero is None else _plain(zero),
    )


def _plain(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise KernelError(f"CPU kernels take tensors on the CPU, not on {tensor.device}")
    return tensor.to(torch.float32).contiguous()
