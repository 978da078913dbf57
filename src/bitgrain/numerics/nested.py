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

from bitgrain.numerics.affine import as_stored, store_zero, to_codes
from bitgrain.numerics.formats import FloatFormat, IntFormat
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.qtensor import QTensor, scale_values
from bitgrain.numerics.quotient import quotient
from bitgrain.numerics.ranges.search import real_elements, tile_pieces, tile_products
from bitgrain.numerics.scales import encode_scale, round_scale
from bitgrain.numerics.spec import QuantSpec

_TRIED = 20
_LEAST, _MOST = 0.95, 1.33  # outer scales that are tried, relative to the one that reaches the largest


@dataclass(frozen=True)
class Products:
    """Sums over the elements of each tile, float64 [down, across]: of the weights w, of w v and of w v v."""

    w: Tensor
    wv: Tensor
    wvv: Tensor

    @property
    def slope(self) -> Tensor:
        """By how much the best minimum grows with the scale, for the same codes."""
        return torch.where(self.w > 0, self.wv / self.w, 0.0)

    @staticmethod
    def of(tiles: Tensor, weights: Tensor | None, spec: QuantSpec, ideal: Tensor, zero: Tensor | None) -> Products:
        """For the numbers v of `tiles` [down, across, n] under ideal scales and real zero points [down, across].

        Tiles are NaN beyond the edge; weights likewise shaped, None: all 1.
        """
        down, across, n = tiles.shape
        real, counted = real_elements(tiles, weights)
        x = real.reshape(-1, n)
        counts = torch.ones_like(x) if counted is None else counted.reshape(-1, n)
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
        and nested.granularity.run is None
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
    curve = (products.wvv - products.slope * products.wv).clamp(min=0.0)
    scale = _search(ideal, spec.scale, curve, f"{name} (scales)")
    minimum = follow(zero, ideal, scale_values(scale), products.slope, spec)
    return scale, _search(minimum, spec.minimum, products.w, f"{name} (minima)", lost=True)


def follow(zero: Tensor, ideal: Tensor, steps: Tensor, slope: Tensor, spec: QuantSpec) -> Tensor:
    """The minima, float32, that are best for the scales `steps` instead of ideal ones; `slope`: see `Products`."""
    minimum = store_zero(zero, ideal, ideal, spec)
    assert minimum is not None
    moved = (minimum + slope * (steps - ideal)).clamp(min=spec.least_minimum).to(torch.float32)
    return moved.masked_fill(steps == 0, 0.0)


def _search(values: Tensor, spec: QuantSpec, weights: Tensor, name: str, lost: bool = False) -> QTensor:
    """`values` [down, across] under the outer scales with the least weighted squared error; `lost`: may become 0."""
    tiles, counts = to_tiles(values, spec.granularity), to_tiles(weights.to(torch.float32), spec.granularity)
    base = quotient(tiles.abs().amax(dim=-1), spec.high)
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
    stored = encode_scale(best, spec, name)
    codes = from_tiles(to_codes(tiles, scale_values(stored), None, spec), spec.granularity, tuple(values.shape))
    return QTensor((codes if lost else not_lost(codes, values, spec)).contiguous(), stored, None, spec)


def not_lost(numbers: Tensor, scale: Tensor, nested: QuantSpec) -> Tensor:
    """Codes or numbers of nested integer scales, but no 0 for a `scale` that is none: one step, which it may cost."""
    one = scale.sign().clamp(nested.low, nested.high).to(numbers.dtype)
    return torch.where((numbers == 0) & (scale != 0), one, numbers)
