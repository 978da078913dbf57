"""Outer scales for nested scales and minima: the super-blocks of llama.cpp's k-quants.

The scales s of a few tiles are integers times one outer scale d, and so are the minima m. Which d rounds them best is
searched for, under the weighted squared error that this makes of the weights: with the codes v of the ideal scales, a
tile loses (s' - s)^2 (sum w v^2 - (sum w v)^2 / sum w) where its minimum may follow its scale, and (m' - m)^2 sum w
where the minimum is rounded. That takes no more than three sums for each tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics import IntFormat, QTensor, QuantSpec, quantize
from bitgrain.numerics.affine import as_stored, store_zero
from bitgrain.numerics.formats import FloatFormat
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import not_lost
from bitgrain.numerics.ranges.search import tile_pieces, tile_products
from bitgrain.numerics.scales import encode_scale, round_scale

_TRIED = 20
_LEAST, _MOST = 0.95, 1.33  # outer scales that are tried, relative to the one that reaches the largest


@dataclass(frozen=True)
class Products:
    """Sums over the elements of each tile, float64 [down, across]: of the weights w, of w v and of w v v."""

    w: Tensor
    wv: Tensor
    wvv: Tensor

    @staticmethod
    def of(weight: Tensor, spec: QuantSpec, ideal: Tensor, zero: Tensor | None, importance: Tensor) -> Products:
        """For the numbers v of `weight` [out, in] under ideal scales and real zero points; importance [in]."""
        tiles = to_tiles(weight, spec.granularity)
        down, across, n = tiles.shape
        x = tiles.reshape(-1, n)
        counts = to_tiles(importance.expand(weight.shape), spec.granularity).reshape(-1, n)
        steps, stored = as_stored(ideal.reshape(-1), None if zero is None else zero.reshape(-1), spec)
        sums = torch.empty(3, x.shape[0], dtype=torch.float64, device=x.device)
        for part in tile_pieces(*x.shape, native=True):
            found = tile_products(x[part], counts[part], steps[part], None if stored is None else stored[part], spec)
            sums[:, part] = torch.stack([counts[part].sum(dim=-1, dtype=torch.float64), found[1], found[2]])
        return Products(*sums.view(3, down, across))


def has_rows_of_its_own(spec: QuantSpec) -> bool:
    """Whether scales, and minima if there are any, are nested integers, whose outer scales are those of single rows."""
    storages = [spec.scale] if spec.minimum is None else [spec.scale, spec.minimum]
    return all(
        isinstance(nested, QuantSpec)
        and nested.symmetric
        and isinstance(nested.format, IntFormat)
        and nested.granularity.rows == 1
        and isinstance(nested.scale, FloatFormat)
        and nested.scale.is_signed
        for nested in storages
    )


def search_nested(
    spec: QuantSpec, ideal: Tensor, zero: Tensor | None, products: Products, name: str
) -> tuple[QTensor, QTensor | None]:
    """Nested scales and minima for ideal scales and real zero points [down, across] (see `has_rows_of_its_own`).

    Raises NumericsError where an outer scale overflows its storage.
    """
    assert isinstance(spec.scale, QuantSpec)
    if zero is None or spec.minimum is None:
        return _search(ideal, spec.scale, products.wvv, f"{name} (scales)"), None
    assert isinstance(spec.minimum, QuantSpec)
    slope = torch.where(products.w > 0, products.wv / products.w, 0.0)
    scale = _search(ideal, spec.scale, (products.wvv - slope * products.wv).clamp(min=0.0), f"{name} (scales)")
    minimum = store_zero(zero, ideal, ideal, spec)
    assert minimum is not None
    moved = (minimum + slope * (scale_values(scale) - ideal)).clamp(min=spec.least_minimum).to(torch.float32)
    return scale, _search(moved, spec.minimum, products.w, f"{name} (minima)", lost=True)


def _search(values: Tensor, spec: QuantSpec, weights: Tensor, name: str, lost: bool = False) -> QTensor:
    """`values` [down, across] under the outer scales with the least weighted squared error; `lost`: may become 0."""
    tiles, counts = to_tiles(values, spec.granularity), to_tiles(weights.to(torch.float32), spec.granularity)
    base = tiles.abs().amax(dim=-1) / spec.high
    best, least = round_scale(base, spec), torch.full_like(base, torch.inf)
    for factor in torch.linspace(_LEAST, _MOST, _TRIED).tolist():
        outer = round_scale(base * factor, spec)
        divisor = outer.masked_fill(outer == 0, 1.0).unsqueeze(-1)
        numbers = spec.format.round((tiles / divisor).clamp(spec.low, spec.high))
        if not lost:
            numbers = not_lost(numbers, tiles, spec)
        error = numbers.mul_(outer.unsqueeze(-1)).sub_(tiles).square_().mul_(counts).sum(dim=-1)
        better = error < least
        best, least = torch.where(better, outer, best), torch.where(better, error, least)
    found = quantize(values, spec, scale=encode_scale(best, spec, name), name=name)
    if not lost:
        found.codes.copy_(not_lost(found.codes, values, spec))
    return found
