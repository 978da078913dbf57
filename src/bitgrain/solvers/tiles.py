"""What solvers that only choose scales and zero points share: the tiles of a weight, and their codes in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.numerics import QTensor, QuantSpec, quantize
from bitgrain.numerics.formats import Format
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.quantize import check_finite, store_chosen
from bitgrain.numerics.ranges.search import real_elements, tile_pieces
from bitgrain.numerics.sums import row_sums

Improve = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(tiles [t, n], their counts, scales [t], zero points) -> better scales and zero points."""


@dataclass(frozen=True)
class Tiles:
    """A weight [out, in] in tiles, and the ideal scales and zero points it starts from.

    weight  float32 [out, in]
    x       float32 [t, n]: its tiles, 0 beyond the edge
    counts  how much each element counts, [t, n], 0 beyond the edge; None: all the same
    scale   float32 [t]: ideal, 0 for an all-zero tile; zero: likewise, None if symmetric
    """

    weight: Tensor
    spec: QuantSpec
    x: Tensor
    counts: Tensor | None
    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(weight: Tensor, spec: QuantSpec, importance: Tensor | None, name: str) -> Tiles:
        """`weight` as its spec's own range would have it; `importance` [in]. Raises NumericsError for NaN and Inf."""
        x = weight.to(torch.float32)
        check_finite(x, name)
        weights = None
        if importance is not None:
            weights = to_tiles(importance.to(torch.float32).expand(x.shape), spec.granularity)
        scale, zero = spec.range.scale(to_tiles(x, spec.granularity, spec.range.fill), spec, weights)
        tiles, counts = real_elements(to_tiles(x, spec.granularity, math.nan), weights)
        flat = tiles.reshape(-1, tiles.shape[-1])
        return Tiles(
            x,
            spec,
            flat,
            None if counts is None else counts.reshape(flat.shape),
            scale.reshape(-1),
            None if zero is None else zero.reshape(-1),
        )

    def improved(self, improve: Improve) -> tuple[Tensor, Tensor | None]:
        """What `improve` makes of the ideal scales and zero points [t], a piece of the tiles at a time."""
        scale, zero = self.scale.clone(), None if self.zero is None else self.zero.clone()
        for part in tile_pieces(*self.x.shape):
            counts = None if self.counts is None else self.counts[part]
            found = improve(self.x[part], counts, self.scale[part], None if self.zero is None else self.zero[part])
            scale[part] = found[0]
            if zero is not None and found[1] is not None:
                zero[part] = found[1]
        return scale, zero

    def pack_better(
        self, scale: Tensor, zero: Tensor | None, norm: float, outer_scale: Tensor | None, name: str
    ) -> QTensor:
        """`pack` with these ideal scales and zero points [t], of which each is known to be no worse in plain storage.

        Nested scales are rounded together: if sum counts * |error| ** norm is higher in the end, the start is packed.
        """
        found = replace(self, scale=scale, zero=zero).pack(outer_scale, name)
        if isinstance(self.spec.scale, Format) and not isinstance(self.spec.minimum, QuantSpec):
            return found
        start = self.pack(outer_scale, name)
        return found if self._loss(found, norm) < self._loss(start, norm) else start

    def _loss(self, q: QTensor, norm: float) -> float:
        error = to_tiles(self.weight - q.dequantize(), self.spec.granularity).reshape(self.x.shape).abs_().pow_(norm)
        return float(row_sums(error if self.counts is None else error.mul_(self.counts)).sum().item())

    def pack(self, outer_scale: Tensor | None, name: str) -> QTensor:
        """Scales and zero points stored, and each weight's nearest code. Raises NumericsError: a scale overflows."""
        grid = self.spec.granularity.tiles(tuple(self.weight.shape))
        ideal, zero = self.scale.view(grid), None if self.zero is None else self.zero.view(grid)
        tiles = to_tiles(self.weight, self.spec.granularity, math.nan)
        counts = None if self.counts is None else self.counts.view(tiles.shape)
        scale, stored = store_chosen(tiles, counts, ideal, zero, self.spec, name, outer_scale)
        return quantize(self.weight, self.spec, scale=scale, zero=stored, name=name)
