"""Which elements cost a tile most: the error that each would save if it were kept apart from the codes.

SpQR, arXiv 2306.03078, algorithm 1 (function `outliers`): the error of a group is measured with and without each of its
weights, with the group's scale fitted anew. Only the smallest and the largest element have a say in min-max limits, so
the scale is fitted anew for these two; every other element saves its own error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitgrain.numerics.affine import as_stored, from_grid, to_grid
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.ranges.search import tile_error, tile_pieces
from bitgrain.numerics.spec import QuantSpec
from bitgrain.numerics.sums import row_sums

_ROUNDS = 4


def find_outliers(x: Tensor, spec: QuantSpec, importance: Tensor | None, count: int) -> Tensor:
    """The `count` elements of `x` (float32 [rows, cols]) that are best kept apart, as bool [rows, cols].

    spec        how the rest is quantized; its own `outliers` are not looked at
    importance  non-negative, broadcastable to x: the weight of each squared error; None: all count the same

    Found in four rounds, since the second largest of a tile matters only once the largest is gone.
    """
    kept = torch.zeros_like(x, dtype=torch.bool)
    weights = torch.ones_like(x) if importance is None else importance.to(torch.float32).expand(x.shape)
    for i in range(_ROUNDS):
        more = count * (i + 1) // _ROUNDS - count * i // _ROUNDS
        if more:
            kept |= largest(leave_one_out(x, kept, spec, weights), more)
    return kept


def leave_one_out(x: Tensor, kept: Tensor, spec: QuantSpec, weights: Tensor) -> Tensor:
    """What each element of `x` would save, float32 [rows, cols]; -inf for those `kept` apart already.

    All are [rows, cols]; the loss is the sum of weights * (x - x_hat)^2 over the others.
    """
    shape, granularity = tuple(x.shape), spec.granularity
    tiles = to_tiles(x.masked_fill(kept, math.nan), granularity, math.nan)
    flat = tiles.reshape(-1, tiles.shape[-1])
    counts = to_tiles(weights, granularity).reshape(flat.shape)
    gains = torch.empty_like(flat)
    for part in tile_pieces(*flat.shape):
        gains[part] = _gains(flat[part], counts[part], spec)
    return from_tiles(gains.view(tiles.shape), granularity, shape)


def largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` largest elements of `x` are, bool; of equal ones the first in order."""
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    flat = x.reshape(-1)
    least = flat.topk(count).values[-1]
    chosen = flat > least
    equal = (flat == least).nonzero()[:, 0]
    chosen[equal[: count - int(chosen.sum().item())]] = True
    return chosen.view(x.shape)


def fill_gaps(tiles: Tensor, fill: float) -> Tensor:
    """Tiles [..., n] whose NaN are replaced by what a range ignores (its `fill`); by 0 in a tile of nothing else."""
    gaps = tiles.isnan()
    filled = tiles if math.isnan(fill) else tiles.masked_fill(gaps, fill)
    return filled.masked_fill(gaps.all(dim=-1, keepdim=True), 0.0)


def _gains(tiles: Tensor, weights: Tensor, spec: QuantSpec) -> Tensor:
    """`leave_one_out` of tiles [t, n]; NaN are no elements."""
    gaps = tiles.isnan()
    x = tiles.masked_fill(gaps, 0.0)
    counts = weights.masked_fill(gaps, 0.0)
    scale, zero = _fit(tiles, weights, spec)
    steps, stored = as_stored(scale, zero, spec)
    errors = from_grid(to_grid(x, steps, stored, spec), steps, stored).sub_(x).square_().mul_(counts)
    total = row_sums(errors)
    gains = errors.clone()
    for end in (tiles.nan_to_num(nan=math.inf).argmin(-1), tiles.nan_to_num(nan=-math.inf).argmax(-1)):
        place = end.unsqueeze(-1)
        without = tiles.scatter(-1, place, math.nan)
        fitted = _fit(without, weights, spec)
        rest = tile_error(x, counts.scatter(-1, place, 0.0), *fitted, spec)
        gains.scatter_(-1, place, (total - rest).to(torch.float32).unsqueeze(-1))
    return gains.masked_fill_(gaps, -math.inf)


def _fit(tiles: Tensor, weights: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """The range's scale and zero point [t] of tiles [t, n] with NaN."""
    choice = spec.range
    scale, zero = choice.scale(fill_gaps(tiles, choice.fill).unsqueeze(0), spec, weights.unsqueeze(0))
    return scale.squeeze(0), None if zero is None else zero.squeeze(0)
