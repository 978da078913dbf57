"""How the scales, zero points and minima of a matrix are stored: what a solver's ideal ones become, and packing them.

Nested scales and minima (double quantization) are rounded under outer scales that are fixed first, so that each can be
chosen alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec
from bitgrain.numerics.about_mean import about
from bitgrain.numerics.affine import from_grid, real_zero, store_zero, to_grid
from bitgrain.numerics.formats import E8M0, FloatFormat, Format
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.nested import Products, follow, has_rows_of_its_own, not_lost, search_nested
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import quantize, store_minimum, store_offset, store_scale
from bitgrain.numerics.scales import check_scale, round_scale, scale_of_zeros
from bitgrain.solvers.steps import Steps, per_element


@dataclass(frozen=True)
class Nested:
    """The grid of nested scales or minima [down, across]: their own scale, zero point and minimum stay what they are.

    stored  as they are packed; outer, zero, minimum: of `stored`, one for each of its elements
    """

    stored: QTensor
    outer: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None

    @staticmethod
    def of(stored: Tensor | QTensor | None) -> Nested | None:
        """None for plain storage."""
        if not isinstance(stored, QTensor):
            return None
        granularity, shape = stored.spec.granularity, (stored.shape[0], stored.shape[1])
        zero = None if stored.zero is None else per_element(stored.zero.to(torch.float32), granularity, shape)
        minimum = None if stored.minimum is None else per_element(scale_values(stored.minimum), granularity, shape)
        return Nested(stored, per_element(scale_values(stored.scale), granularity, shape), zero, minimum)

    def round(self, ideal: Tensor, rows: slice, columns: slice, lost: bool) -> Tensor:
        """The nearest that can be stored, in these rows and columns; `lost`: whether numbers may become 0."""
        outer, spec = self.outer[rows, columns], self.stored.spec
        zero = None if self.zero is None else self.zero[rows, columns]
        shifted = ideal if self.minimum is None else ideal + self.minimum[rows, columns]
        numbers = to_grid(shifted.unsqueeze(-1), outer, zero, spec).squeeze(-1)
        if not lost and spec.symmetric and isinstance(spec.format, IntFormat):
            numbers = not_lost(numbers, ideal, spec)
        return self.mean(numbers, rows, columns)

    def mean(self, numbers: Tensor, rows: slice, columns: slice) -> Tensor:
        """What numbers of the nested format stand for in these rows and columns."""
        zero = None if self.zero is None else self.zero[rows, columns]
        values = from_grid(numbers.clone().unsqueeze(-1), self.outer[rows, columns], zero).squeeze(-1)
        return values if self.minimum is None else values - self.minimum[rows, columns]

    def pack(self, values: Tensor, name: str) -> QTensor:
        """[down, across], each one that can be stored."""
        if isinstance(self.stored.minimum, Tensor) and isinstance(self.stored.scale, Tensor):
            return about(values, self.stored.spec, self.stored.scale, self.stored.minimum)
        return quantize(values, self.stored.spec, scale=self.stored.scale, zero=self.stored.zero, name=name)

    def chosen(self, other: Nested, where: Tensor) -> Nested:
        """That of `other` for the rows in `where` (bool [down]); of each row, the nested scales are its own."""
        mine, its = self.stored.scale, other.stored.scale
        assert isinstance(mine, Tensor)
        assert isinstance(its, Tensor)
        mask = where.unsqueeze(1)
        stored = replace(self.stored, scale=torch.where(mask, its, mine))
        return Nested(stored, torch.where(mask, other.outer, self.outer))


class Storage:
    """How the scales [down, across] of one matrix are stored: rounds any columns of them, and packs them all."""

    def __init__(
        self, spec: QuantSpec, scale: Nested | None, minimum: Nested | None, name: str, slope: Tensor | None = None
    ) -> None:
        """scale, minimum: their grids where they are nested; None for plain storage.

        slope  [down, across]: how minima follow scales that are rounded (`Products.slope`); None: the low ends stay
        """
        self.spec, self.name, self.scale, self.minimum, self.slope = spec, name, scale, minimum, slope

    @staticmethod
    def choose(
        weight: Tensor, spec: QuantSpec, ideal: Tensor, zero: Tensor | None, importance: Tensor,
        outer_scale: Tensor | None, name: str,
    ) -> Storage:  # fmt: skip
        """For scales and zero points of which `ideal` and `zero` [down, across] are examples, only nested ones look.

        weight [out, in] and importance [in]: what they are for. Where each row of nested scales has outer scales of its
        own, they are searched for.
        """
        if spec.ordered:
            raise SchemeError(f"{name}: {spec.describe()}: such files are read, not made; order 'act' needs no order")
        if isinstance(spec.scale, Format) and not isinstance(spec.minimum, QuantSpec):
            return Storage(spec, None, None, name)
        if outer_scale is None and has_rows_of_its_own(spec):
            counts = to_tiles(importance.to(torch.float32).expand(weight.shape), spec.granularity)
            products = Products.of(to_tiles(weight, spec.granularity, torch.nan), counts, spec, ideal, zero)
            scale, minimum = search_nested(spec, ideal, zero, products, name)
            return Storage(spec, Nested.of(scale), Nested.of(minimum), name, products.slope)
        scale = store_scale(ideal, spec, name, outer_scale)
        minimum = store_offset(zero, ideal, scale, spec, name) if isinstance(spec.minimum, QuantSpec) else None
        return Storage(spec, Nested.of(scale), Nested.of(minimum), name)

    @staticmethod
    def of(q: QTensor, name: str = "weight") -> Storage:
        """That of a quantized tensor."""
        return Storage(q.spec, Nested.of(q.scale), Nested.of(q.minimum), name)

    def round(
        self, ideal: Tensor, zero: Tensor | None, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Steps:
        """What ideal scales (0 for an all-zero tile) and real zero points become in these rows and columns of tiles.

        Raises NumericsError for a scale beyond the largest number of its storage.
        """
        spec, steps = self.spec, self.round_scale(ideal, rows, columns)
        if zero is not None and spec.minimum is not None and self.slope is not None:
            minimum = follow(zero, ideal, steps, self.slope[rows, columns], spec)
            return Steps(steps, self.round_minimum(minimum, rows, columns))
        stored = store_zero(zero, ideal, steps, spec)
        if stored is not None and spec.minimum is not None:
            stored = self.round_minimum(stored.masked_fill(steps == 0, 0.0), rows, columns)
        return Steps(steps, None if stored is None else stored.to(torch.float32))

    def round_scale(self, ideal: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The scales of `round` alone."""
        fallback = scale_of_zeros(ideal, self.spec)
        if self.scale is None:
            check_scale(ideal, self.spec, self.name)
            return torch.where(ideal != 0, round_scale(ideal, self.spec), fallback)
        steps = self.scale.round(ideal, rows, columns, lost=False)
        inner = self.scale.stored.spec.format
        if not isinstance(inner, FloatFormat):
            return steps
        filler = torch.where(ideal > 0, torch.full_like(ideal, inner.smallest_positive), fallback)
        filled = self.scale.mean(inner.round(filler), rows, columns)  # a scale is divided by: none may be 0
        return torch.where((steps > 0) & (ideal > 0), steps, filled)

    def round_minimum(self, minimum: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Minima as they are stored, float32. Raises NumericsError for one beyond the largest number of the storage."""
        if self.minimum is not None:
            return self.minimum.round(minimum, rows, columns, lost=True)
        assert isinstance(self.spec.minimum, FloatFormat)
        return scale_values(store_minimum(minimum, self.spec.minimum, self.name))

    def round_zero(self, zero: Tensor) -> Tensor:
        """Real zero points as they are stored, float32."""
        return real_zero(zero, self.spec).to(torch.float32)

    def pack(self, codes: Tensor, steps: Steps) -> QTensor:
        """The QTensor of these codes, scales and zero points [down, across]."""
        spec = self.spec
        scale = self._pack_plain(steps.scale) if self.scale is None else self.scale.pack(steps.scale, self.name)
        if steps.zero is None:
            return QTensor(codes, scale, None, spec)
        if spec.minimum is not None:
            plain = None if self.minimum is not None else store_minimum(steps.zero, spec.minimum, self.name)
            return QTensor.of(codes, scale, plain if self.minimum is None else self.minimum.pack(steps.zero, self.name),
                              spec)  # fmt: skip
        integer = spec.zero_point == "integer"
        zero = steps.zero.to(spec.format.code_dtype) if integer else real_zero(steps.zero, spec)
        return QTensor(codes, scale, zero, spec)

    def _pack_plain(self, steps: Tensor) -> Tensor:
        assert isinstance(self.spec.scale, FloatFormat)
        dtype = self.spec.scale.torch_dtype
        assert dtype is not None
        if self.spec.scale == E8M0:  # the exponent field of a float32 is the E8M0 code
            codes = (steps.contiguous().view(torch.int32) >> 23).to(torch.uint8)
            return codes.view(dtype)
        return steps.to(dtype).contiguous()

    def chosen(self, other: Storage, where: Tensor) -> Storage:
        """The nested grids of `other` for the rows of tiles in `where` (see `has_rows_of_its_own`)."""
        scale, minimum = self.scale, self.minimum
        if scale is not None and other.scale is not None:
            scale = scale.chosen(other.scale, where)
        if minimum is not None and other.minimum is not None:
            minimum = minimum.chosen(other.minimum, where)
        slope = self.slope
        if slope is not None and other.slope is not None:
            slope = torch.where(where.unsqueeze(1), other.slope, slope)
        return Storage(self.spec, scale, minimum, self.name, slope)
