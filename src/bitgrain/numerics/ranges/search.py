"""What the range searches share: real elements, tiles in pieces of bounded size, and the error of a candidate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.kernels.native import serves
from bitgrain.kernels.tile_search import tile_sums
from bitgrain.numerics.affine import as_stored, from_grid, to_grid
from bitgrain.numerics.native_grid import native_grid
from bitgrain.numerics.sums import row_sums

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec

PIECE = 2**18
"""Elements that are worked on at a time: a few temporaries of this size fit in a core's cache."""
_NATIVE_PIECE, _NATIVE_TILES = 2**22, 2**14
"""The same for kernels, whose only temporaries are numbers for each tile and candidate."""


def grid_for(spec: QuantSpec, tiles: Tensor) -> Any | None:
    """The grid with which the kernels search these tiles; None: torch does."""
    return native_grid(spec) if serves(tiles) else None


def real_elements(tiles: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tiles whose NaN (beyond the edge) are replaced by 0, and weights that are 0 there; None: all count the same."""
    beyond = tiles.isnan()
    if not bool(beyond.any().item()):
        return tiles, None if importance is None else importance.to(torch.float32).expand(tiles.shape)
    weights = torch.ones_like(tiles) if importance is None else importance.to(torch.float32).expand(tiles.shape)
    return tiles.masked_fill(beyond, 0.0), weights.masked_fill(beyond, 0.0)


def tile_pieces(count: int, size: int, *, native: bool = False) -> Iterator[slice]:
    """Slices of `count` tiles of `size` elements: as many tiles as make up one piece, at least one."""
    step = min(_NATIVE_PIECE // max(1, size), _NATIVE_TILES) if native else PIECE // max(1, size)
    step = max(1, step)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def element_pieces(tiles: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Pieces along the last axis, for tiles that are larger than one piece."""
    step = max(1, PIECE // max(1, tiles.shape[0]))
    for start in range(0, tiles.shape[-1], step):
        piece = slice(start, start + step)
        yield tiles[..., piece], None if weights is None else weights[..., piece]


def tile_products(
    tiles: Tensor, weights: Tensor | None, steps: Tensor, zero: Tensor | None, spec: QuantSpec, products: bool = True
) -> list[Tensor]:
    """Sums over each tile, float64 [t]: of w (x - x_hat)^2, and with `products` of w v, w v v and w x v.

    tiles, weights [t, n]; steps, zero [t], as stored; v stands for the numbers of the codes.
    """
    grid = grid_for(spec, tiles)
    if grid is not None:
        sums = tile_sums(tiles, weights, steps, zero, grid, products=products)
        return list(sums) if products else [*sums, *sums, *sums, *sums]
    totals = [torch.zeros(tiles.shape[0], dtype=torch.float64, device=tiles.device) for _ in range(4)]
    for x, w in element_pieces(tiles, weights):
        v = to_grid(x, steps, zero, spec)
        if products:
            wv = v if w is None else w * v
            totals[1] += row_sums(wv)
            totals[2] += row_sums(wv * v)
            totals[3] += row_sums(wv * x)
        error = from_grid(v, steps, zero).sub_(x).square_()
        totals[0] += row_sums(error if w is None else error.mul_(w))
    return totals


def tile_error(
    tiles: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    norm: float = 2.0,
) -> Tensor:
    """Sum of weights * |x - x_hat| ** norm of each tile, float64 [t]; x_hat with scale and zero point as stored.

    tiles, weights [t, n]; scale, zero [t], ideal.
    """
    steps, stored_zero = as_stored(scale, zero, spec)
    grid = grid_for(spec, tiles) if norm == 2 else None
    if grid is not None:
        return tile_sums(tiles, weights, steps, stored_zero, grid)[0]
    total = torch.zeros(tiles.shape[0], dtype=torch.float64, device=tiles.device)
    for x, w in element_pieces(tiles, weights):
        error = from_grid(to_grid(x, steps, stored_zero, spec), steps, stored_zero).sub_(x)
        error = error.square_() if norm == 2 else error.abs_().pow_(norm)
        total += row_sums(error if w is None else error.mul_(w))
    return total
