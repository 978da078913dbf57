"""Scales and zero points while a solver works on them: float32 numbers that their storage can hold exactly.

A solver fits ideal scales, rounds them to what is stored before it divides by one of them, and packs all at the end.
Nested scales (double quantization) are rounded under an outer scale that is fixed first, so that each can be chosen
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics import Granularity, QTensor, QuantSpec
from bitgrain.numerics.about_mean import about
from bitgrain.numerics.affine import from_grid, store_zero, to_grid
from bitgrain.numerics.formats import E8M0, FloatFormat, Format
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import quantize, store_scale
from bitgrain.numerics.ranges import Range
from bitgrain.numerics.scales import check_scale, round_scale, scale_of_zeros


@dataclass(frozen=True)
class Steps:
    """Scales as stored and zero points as stored, both as float32 [down, across]; `zero` is None if symmetric."""

    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(q: QTensor) -> Steps:
        """Those of a quantized tensor (copies)."""
        zero = None if q.zero is None else q.zero.to(torch.float32, copy=True)
        return Steps(scale_values(q.scale).to(torch.float32, copy=True), zero)


class Storage:
    """How the scales [down, across] of one matrix are stored: rounds any columns of them, and packs them all."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], nested: QTensor | None, name: str = "weight") -> None:
        """`nested`: the scales in their nested storage, of which the outer scale stays; None for plain storage."""
        self.spec, self.name, self._nested = spec, name, nested
        self._outer: Tensor | None = None
        self._outer_zero: Tensor | None = None
        self._outer_minimum: Tensor | None = None
        if nested is not None:
            self._outer = per_element(scale_values(nested.scale), nested.spec.granularity, shape)
            if nested.minimum is not None:
                self._outer_minimum = per_element(scale_values(nested.minimum), nested.spec.granularity, shape)
            if nested.zero is not None:
                self._outer_zero = per_element(nested.zero.to(torch.float32), nested.spec.granularity, shape)

    @staticmethod
    def choose(spec: QuantSpec, ideal: Tensor, outer_scale: Tensor | None, name: str = "weight") -> Storage:
        """For scales of which `ideal` [down, across] are examples; only nested storage looks at them."""
        stored = None if isinstance(spec.scale, Format) else store_scale(ideal, spec, name, outer_scale)
        return Storage(spec, (ideal.shape[0], ideal.shape[1]), stored if isinstance(stored, QTensor) else None, name)

    @staticmethod
    def of(q: QTensor, name: str = "weight") -> Storage:
        """That of a quantized tensor."""
        shape = q.spec.granularity.tiles(q.shape)
        return Storage(q.spec, shape, q.scale if isinstance(q.scale, QTensor) else None, name)

    def round(
        self, ideal: Tensor, zero: Tensor | None, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Steps:
        """What ideal scales (0 for an all-zero tile) and real zero points become in these rows and columns of tiles.

        Raises NumericsError for a scale beyond the largest number of its storage.
        """
        spec = self.spec
        fallback = scale_of_zeros(ideal, spec)
        if self._outer is None:
            check_scale(ideal, spec, self.name)
            steps = torch.where(ideal != 0, round_scale(ideal, spec), fallback)
        else:
            assert isinstance(spec.scale, QuantSpec)
            outer = self._outer[rows, columns]
            outer_zero = None if self._outer_zero is None else self._outer_zero[rows, columns]
            minimum = 0.0 if self._outer_minimum is None else self._outer_minimum[rows, columns]
            numbers = to_grid((ideal + minimum).unsqueeze(-1), outer, outer_zero, spec.scale)
            steps = from_grid(numbers, outer, outer_zero).squeeze(-1) - minimum
            if isinstance(spec.scale.format, FloatFormat):  # a scale is divided by: none may be 0
                inner = spec.scale.format
                filler = torch.where(ideal > 0, torch.full_like(ideal, inner.smallest_positive), fallback)
                filled = from_grid(inner.round(filler).unsqueeze(-1), outer, outer_zero).squeeze(-1)
                steps = torch.where((steps > 0) & (ideal > 0), steps, filled)
        stored = store_zero(zero, ideal, steps, spec)
        return Steps(steps, None if stored is None else stored.to(torch.float32))

    def round_zero(self, zero: Tensor) -> Tensor:
        """Real zero points as they are stored, float32."""
        storage = self.spec.scale_format
        dtype = storage.torch_dtype if isinstance(storage, FloatFormat) else None
        return zero.to(dtype or torch.float32).to(torch.float32)

    def pack(self, steps: Steps) -> tuple[Tensor | QTensor, Tensor | None]:
        """Scales and zero points [down, across] as a `QTensor` holds them."""
        zero = None
        if steps.zero is not None:
            storage = self.spec.scale_format
            dtype = storage.torch_dtype if isinstance(storage, FloatFormat) else None
            integer = self.spec.zero_point == "integer"
            zero = steps.zero.to(self.spec.format.code_dtype if integer else dtype or torch.float32)
        if self._nested is not None:
            nested = self._nested
            if isinstance(nested.minimum, Tensor) and isinstance(nested.scale, Tensor):
                return about(steps.scale, nested.spec, nested.scale, nested.minimum), zero
            return quantize(steps.scale, nested.spec, scale=nested.scale, zero=nested.zero, name=self.name), zero
        assert isinstance(self.spec.scale, FloatFormat)
        dtype = self.spec.scale.torch_dtype
        assert dtype is not None
        if self.spec.scale == E8M0:  # the exponent field of a float32 is the E8M0 code
            codes = (steps.scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
            return codes.view(dtype), zero
        return steps.scale.to(dtype).contiguous(), zero


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
    """Scales and zero points of matrix rows side by side: column k of the tiles is one contiguous vector [rows]."""

    def __init__(self, spec: QuantSpec, across: int, rows: int, device: torch.device) -> None:
        self.spec = spec
        self.scale = torch.ones(across, rows, device=device)
        self.zero = None if spec.symmetric else torch.zeros(across, rows, device=device)
        self._divisor = self.scale

    def put(self, steps: Steps, tile_rows: int, rows: int, first: int = 0, column: int = 0) -> None:
        """`steps` become those of the rows from `first` on, in the columns of tiles from `column` on."""
        across = steps.scale.shape[1]
        place = (slice(column, column + across), slice(first, first + rows))
        self.scale[place] = per_row(steps.scale, tile_rows, rows).t()
        if self.zero is not None and steps.zero is not None:
            self.zero[place] = per_row(steps.zero, tile_rows, rows).t()
        if self._divisor is self.scale and bool((steps.scale == 0).any().item()):
            self._divisor = torch.ones_like(self.scale)
        if self._divisor is not self.scale:  # as in `numerics.affine.scaled`: a step of 0 counts as 1
            self._divisor = self.scale.masked_fill(self.scale == 0, 1.0)

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
        """s * (v - z), a new tensor."""
        return numbers * self.scale[k] if self.zero is None else (numbers - self.zero[k]).mul_(self.scale[k])
