"""Granularity: the tile of elements that share one scale. Every granularity is one thing, a tile of rows x columns.

A tensor of any rank is seen as a matrix: the last axis is the columns (input features), all others together are the
rows (output channels of a weight, tokens of an activation). One pair of functions, `to_tiles` and `from_tiles`, serves
all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from bitgrain.errors import SchemeError


@dataclass(frozen=True)
class Granularity:
    """A tile of `rows` x `cols` elements; None means "all of them".

    run  other than None: so many consecutive elements, row after row, over the ends of rows; for scales of scales only
         (bitsandbytes), which `rows` and `cols` say nothing of
    """

    rows: int | None
    cols: int | None
    run: int | None = None

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols, self.run):
            if size is not None and size < 1:
                raise SchemeError(f"a tile needs at least one row and one column, not {self.rows} x {self.cols}")

    @property
    def name(self) -> str:
        """The field's name of this tile, readable back by `parse_granularity`."""
        if self.run is not None:
            return f"per_run({self.run})"
        match (self.rows, self.cols):
            case (None, None):
                return "per_tensor"
            case (1, None):
                return "per_channel"
            case (None, 1):
                return "per_channel(1)"
            case (1, int(cols)):
                return f"per_group({cols})"
            case (int(rows), None):
                return f"per_row_group({rows})"
            case (rows, cols):
                return f"per_block({rows or 'all'}, {cols or 'all'})"

    @property
    def kind(self) -> str | None:
        """`tensor`, `channel`, `group` or `block`, as engines and compressed-tensors name tiles; None for others."""
        match (self.rows, self.cols):
            case (None, None):
                return "tensor"
            case (1, None):
                return "channel"
            case (1, int()):
                return "group"
            case (int(), int()):
                return "block"
            case _:
                return None

    def __str__(self) -> str:
        return self.name

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of one tile on a tensor of `shape` (at least 1 x 1); of runs, as on one long row."""
        if self.run is not None:
            return 1, self.run
        rows, cols = matrix_shape(shape)
        return max(1, self.rows or rows), max(1, self.cols or cols)

    def tiles(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many tiles down and across: the shape of the scales. The last tiles may be cut by the edge."""
        rows, cols = self.matrix(shape)
        tile_rows, tile_cols = self.tile(shape)
        return math.ceil(rows / tile_rows), math.ceil(cols / tile_cols)

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether every tile is whole."""
        rows, cols = self.matrix(shape)
        tile_rows, tile_cols = self.tile(shape)
        return rows % tile_rows == 0 and cols % tile_cols == 0

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """What tiles lie on: the matrix, or the one row that runs go along."""
        return matrix_shape(shape) if self.run is None else (1, math.prod(shape))


def per_tensor() -> Granularity:
    """One scale for the whole tensor."""
    return Granularity(None, None)


def per_channel(axis: int = 0) -> Granularity:
    """One scale for each row (axis 0: output channel) or each column (axis 1: input channel)."""
    if axis not in (0, 1, -1):
        raise SchemeError(f"a channel axis is 0 (rows) or 1 (columns), not {axis}")
    return Granularity(1, None) if axis == 0 else Granularity(None, 1)


def per_token() -> Granularity:
    """One scale for each token of an activation [..., features]: the same tile as `per_channel(0)`."""
    return Granularity(1, None)


def per_group(size: int) -> Granularity:
    """Groups of `size` consecutive input features within one row."""
    return Granularity(1, size)


def per_row_group(size: int) -> Granularity:
    """Groups of `size` whole rows."""
    return Granularity(size, None)


def per_block(rows: int, cols: int) -> Granularity:
    """Blocks of rows x cols."""
    return Granularity(rows, cols)


def per_run(size: int) -> Granularity:
    """Runs of `size` consecutive elements of the flattened matrix."""
    return Granularity(1, None, size)


_SIMPLE = {
    "per_tensor": per_tensor(),
    "tensor": per_tensor(),
    "per_channel": per_channel(),
    "channel": per_channel(),
    "per_token": per_token(),
    "token": per_token(),
}


_OF_SIZE = {"per_channel": per_channel, "per_group": per_group, "per_row_group": per_row_group, "per_run": per_run}


def parse_granularity(text: str | Granularity) -> Granularity:
    """Reads per_tensor, per_channel, per_channel(1), per_token, per_group(128), per_row_group(4), per_block(128, 128),
    per_run(256).

    Raises SchemeError that lists these forms.
    """
    if isinstance(text, Granularity):
        return text
    plain = text.strip().lower().replace(" ", "")
    if plain in _SIMPLE:
        return _SIMPLE[plain]
    if match := re.fullmatch(r"(per_channel|per_group|per_row_group|per_block|per_run)\((\w+)(?:,(\w+))?\)", plain):
        name, *sizes = match.groups()
        numbers = [None if s == "all" else int(s) for s in sizes if s is not None and (s == "all" or s.isdigit())]
        given = len([s for s in sizes if s is not None])
        if len(numbers) == given == (2 if name == "per_block" else 1):
            if name == "per_block":
                return Granularity(numbers[0], numbers[1])
            if (size := numbers[0]) is not None:
                return _OF_SIZE[name](size)
    forms = "per_tensor, per_channel, per_channel(1), per_token, per_group(128), per_row_group(4), per_block(128, 128)"
    raise SchemeError(f"unknown granularity {text!r}; write one of: {forms}")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix that a tensor of any rank is seen as: (product of all axes but the last, last axis)."""
    if not shape:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def to_tiles(x: Tensor, granularity: Granularity, fill: float = 0.0) -> Tensor:
    """[tiles down, tiles across, elements of one tile]; a view where the layout allows. Cut tiles are filled up."""
    rows, cols = granularity.matrix(tuple(x.shape))
    tile_rows, tile_cols = granularity.tile(tuple(x.shape))
    down, across = granularity.tiles(tuple(x.shape))
    matrix = x.reshape(rows, cols)
    if (rows, cols) != (down * tile_rows, across * tile_cols):
        matrix = F.pad(matrix, (0, across * tile_cols - cols, 0, down * tile_rows - rows), value=fill)
    tiles = matrix.reshape(down, tile_rows, across, tile_cols)
    return tiles.transpose(1, 2).reshape(down, across, tile_rows * tile_cols)


def from_tiles(tiles: Tensor, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_tiles`: a tensor of `shape`, what was filled up is dropped."""
    rows, cols = granularity.matrix(shape)
    tile_rows, tile_cols = granularity.tile(shape)
    down, across = granularity.tiles(shape)
    matrix = tiles.reshape(down, across, tile_rows, tile_cols).transpose(1, 2)
    matrix = matrix.reshape(down * tile_rows, across * tile_cols)
    return matrix[:rows, :cols].reshape(shape)
