"""GPTQ's loop over the columns (arXiv 2210.17323, algorithm 1), in torch and by the native kernel.

Both do the same operations on each weight in the same order, but for sums: what the errors of earlier columns come to
is added in another order, so that last bits differ, and with them, now and then, a code (docs/decisions/0023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.descend import Descent
from bitgrain.kernels.native import serves
from bitgrain.numerics.native_grid import native_grid
from bitgrain.solvers.steps import Lanes

FitTile = Callable[[int, int, int], None]
"""(tile column, first column, last column): new scales for it."""


def descend(
    columns: Tensor,
    factor: Tensor,
    tiles: list[int],
    lanes: Lanes,
    block: int,
    fit_tile: FitTile | None = None,
    kept: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop over the columns. Gives their numbers, float32 [in, rows], and the loss of each row, float64 [rows].

    columns   float32 [in, rows]: the weights, in order; overwritten
    factor    U^T, float32 [in, in]
    tiles     for each column the tile column whose scales are its own
    fit_tile  called before the first column of each run of equal `tiles`, with the updated weights in place
    kept      bool [in, rows]: weights that shall stay as they are and make no error; `exact`, float32 [in, rows], is
              filled with every weight as it was when its turn came
    """
    grid = native_grid(lanes.spec) if serves(columns, factor, lanes.scale) else None
    if grid is None:
        return descend_in_torch(columns, factor, tiles, lanes, block, fit_tile, kept, exact)
    return _natively(columns, factor, tiles, lanes, grid, fit_tile, kept, exact)


def _natively(
    columns: Tensor,
    factor: Tensor,
    tiles: list[int],
    lanes: Lanes,
    grid: Any,
    fit_tile: FitTile | None,
    kept: Tensor | None,
    exact: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`descend` by the kernel; `columns` become the numbers."""
    loop = Descent(columns, factor.contiguous(), tiles, grid, kept, exact)
    if fit_tile is None:
        loop.set_tables(*lanes.tables)
        loop.round(0, len(tiles))
    else:
        for first, last in _runs(tiles):
            loop.update(first, last)
            fit_tile(tiles[first], first, last)
            loop.set_tables(*lanes.tables)
            loop.round(first, last, updated=True)
    return columns, loop.loss


def descend_in_torch(
    columns: Tensor,
    factor: Tensor,
    tiles: list[int],
    lanes: Lanes,
    block: int,
    fit_tile: FitTile | None = None,
    kept: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`descend`, for every format and device: readable, and what the kernel is compared with; `columns` become errors.

    An update is made as late as possible: columns are brought up to date when their turn comes, a tile and a block at a
    time by matrix products, then one by one.
    """
    n = columns.shape[0]
    numbers = torch.empty_like(columns)
    loss = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
    diagonal: list[float] = factor.diagonal().tolist()
    for first, last in [(0, n)] if fit_tile is None else _runs(tiles):
        if first:
            columns[first:last].addmm_(factor[first:last, :first], columns[:first], alpha=-1.0)
        if fit_tile is not None:
            fit_tile(tiles[first], first, last)
        for start in range(first, last, block):
            stop = min(start + block, last)
            if start > first:
                columns[start:stop].addmm_(factor[start:stop, first:start], columns[first:start], alpha=-1.0)
            for i in range(start, stop):
                column = columns[i]
                if i > start:
                    column.addmv_(columns[start:i].t(), factor[i, start:i], alpha=-1.0)
                if exact is not None:
                    exact[i] = column
                torch.sub(column, lanes.values(lanes.round_into(numbers[i], column, tiles[i]), tiles[i]), out=column)
                column.div_(diagonal[i])
                if kept is not None:
                    column.masked_fill_(kept[i], 0.0)
            loss += columns[start:stop].square().sum(dim=0, dtype=torch.float64)
    return numbers, loss


def _runs(tiles: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for i in range(1, len(tiles) + 1):
        if i == len(tiles) or tiles[i] != tiles[first]:
            yield first, i
            first = i
