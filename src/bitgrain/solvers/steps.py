"""Scales and zero points while a solver works on them: float32 numbers that their storage can hold exactly.

A solver fits ideal scales, rounds them to what is stored (`solvers.storage`) before it divides by one of them, and
packs all at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics import Granularity, QTensor, QuantSpec
from bitgrain.numerics.affine import as_zero
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import Range


@dataclass(frozen=True)
class Steps:
    """Scales and zero points (or minima) as stored, all float32 [down, across]; `zero` is None if symmetric."""

    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(q: QTensor) -> Steps:
        """Those of a quantized tensor (copies)."""
        zero = None if q.offset is None else scale_values(q.offset).to(torch.float32, copy=True)
        return Steps(scale_values(q.scale).to(torch.float32, copy=True), zero)

    def real_zero(self, spec: QuantSpec) -> Tensor | None:
        """Zero points, or what minima amount to as such."""
        return self.zero if self.zero is None or spec.minimum is None else as_zero(self.zero, self.scale)


def fit(
    weight: Tensor, spec: QuantSpec, choice: Range, importance: Tensor | None, factor: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Ideal scales, times `factor`, and real zero points of the tiles of `weight` [out, any], float32 [down, across].

    importance  [any], for ranges that use it. A factor below 1 narrows the limits about the zero point.
    """
    weights = None if importance is None else to_tiles(importance.expand(weight.shape), spec.granularity)
    scale, zero = choice.scale(to_tiles(weight, spec.granularity, choice.fill), spec, weights)
    return (scale if factor == 1 else scale * factor), zero


def per_element(tiles: Tensor, granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """One number for each tile [down, across] -> one for each element of a matrix of `shape`."""
    tile_rows, tile_cols = granularity.tile(shape)
    if granularity.run is not None:
        return tiles.reshape(-1).repeat_interleave(granularity.run)[: shape[0] * shape[1]].view(shape)
    return per_row(tiles, tile_rows, shape[0]).repeat_interleave(tile_cols, dim=1)[:, : shape[1]]


def per_row(tiles: Tensor, tile_rows: int, rows: int) -> Tensor:
    """[down, any] -> [rows, any]: each tile's number for all of its rows."""
    return tiles if tile_rows == 1 else tiles.repeat_interleave(tile_rows, dim=0)[:rows]


class Lanes:
    """Scales and zero points of matrix rows side by side: column k of the tiles is one contiguous vector [rows].

    With minima, `zero` are what they amount to, m / s: kernels compute s * (v - z).
    """

    def __init__(self, spec: QuantSpec, across: int, rows: int, device: torch.device) -> None:
        self.spec = spec
        self.scale = torch.ones(across, rows, device=device)
        self.zero = None if spec.symmetric else torch.zeros(across, rows, device=device)
        self.minimum = None if spec.minimum is None else torch.zeros(across, rows, device=device)
        self._divisor = self.scale

    def put(self, steps: Steps, tile_rows: int, rows: int, first: int = 0, column: int = 0) -> None:
        """`steps` become those of the rows from `first` on, in the columns of tiles from `column` on."""
        across = steps.scale.shape[1]
        place = (slice(column, column + across), slice(first, first + rows))
        self.scale[place] = per_row(steps.scale, tile_rows, rows).t()
        if self.minimum is not None and steps.zero is not None:
            self.minimum[place] = per_row(steps.zero, tile_rows, rows).t()
        zero = steps.real_zero(self.spec)
        if self.zero is not None and zero is not None:
            self.zero[place] = per_row(zero, tile_rows, rows).t()
        if self._divisor is self.scale and bool((steps.scale == 0).any().item()):
            self._divisor = torch.ones_like(self.scale)
        if self._divisor is not self.scale:  # as in `numerics.affine.scaled`: a step of 0 counts as 1
            self._divisor = self.scale.masked_fill(self.scale == 0, 1.0)

    @property
    def offset(self) -> Tensor | None:
        """Zero points or minima as stored, [across, rows]; None if symmetric."""
        return self.zero if self.minimum is None else self.minimum

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales, divisors (scales, 1 where they are 0) and zero points, each [across, rows]."""
        return self.scale, self._divisor, self.zero

    def round_into(self, out: Tensor, x: Tensor, k: int) -> Tensor:
        """`out` [rows] becomes the format's numbers (float32) nearest to x under the scales of tile column k."""
        scaled = x / self._divisor[k]
        if self.zero is not None:
            scaled += self.zero[k]
        if self.spec.restricted:
            scaled.clamp_(min=self.spec.low)
        return out.copy_(self.spec.format.round(scaled))

    def values(self, numbers: Tensor, k: int) -> Tensor:
        """s * (v - z) or s * v - m, a new tensor."""
        if self.minimum is not None:
            return (numbers * self.scale[k]).sub_(self.minimum[k])
        return numbers * self.scale[k] if self.zero is None else (numbers - self.zero[k]).mul_(self.scale[k])
