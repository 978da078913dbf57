"""A matrix's QTensor as a few named, densely packed tensors, and back: what files hold, and layers that stay low-bit.

codes           uint8 [out, ceil(in * bits / 8)], low bits first, as code + offset; int32 [out, in] above 8 bits
scale           storage dtype [tiles down, tiles across]; nested scales: their codes, packed like `codes`
outer_scale     only for nested scales: the scale of the scales; outer_zero: only for asymmetric ones, outer_minimum:
                only for ones with minima
zero            only with zero points: codes packed like `codes`, or numbers in the storage dtype
minimum         only with minima: as scale; nested ones: minimum_scale, their scale
order           only with an order of the columns: int32 [in]
outlier_starts, outlier_columns, outlier_values   only with outliers, see `numerics.outliers`
column_index, column_values   only with columns in 16 bits, see `numerics.columns`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.numerics.columns import INDEX_DTYPE, Columns
from bitgrain.numerics.formats import FloatFormat, Format
from bitgrain.numerics.outliers import VALUE_DTYPE, Outliers, column_dtype
from bitgrain.numerics.packing import pack, packed_length, rewrap, unpack
from bitgrain.numerics.qtensor import QTensor, unsigned
from bitgrain.numerics.spec import QuantSpec


def packed_specs(spec: QuantSpec, shape: tuple[int, int]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each of these tensors for a matrix of `shape`, in their order."""
    rows, cols = shape
    tiles = spec.granularity.tiles(shape)
    found: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("codes", *_packed(spec.format, (rows, cols)))]
    if isinstance(spec.scale, QuantSpec):
        inner = spec.scale.granularity.tiles(tiles)
        found += [("scale", *_packed(spec.scale.format, tiles)), ("outer_scale", scale_dtype(spec.scale), inner)]
        if isinstance(spec.scale.minimum, Format):
            found.append(("outer_minimum", float_dtype(spec.scale.minimum), inner))
        elif not spec.scale.symmetric:
            found.append(("outer_zero", *_zeros(spec.scale, inner)))
    else:
        found.append(("scale", scale_dtype(spec), tiles))
    if spec.zero_point in ("integer", "real"):
        found.append(("zero", *_zeros(spec, tiles)))
    if isinstance(spec.minimum, QuantSpec):
        inner = spec.minimum.granularity.tiles(tiles)
        found += [
            ("minimum", *_packed(spec.minimum.format, tiles)),
            ("minimum_scale", scale_dtype(spec.minimum), inner),
        ]
    elif spec.minimum is not None:
        found.append(("minimum", float_dtype(spec.minimum), tiles))
    if spec.ordered:
        found.append(("order", INDEX_DTYPE, (cols,)))
    if spec.outliers:
        count = (spec.count_outliers(shape),)
        found += [
            ("outlier_starts", torch.int32, (rows + 1,)),
            ("outlier_columns", column_dtype(cols), count),
            ("outlier_values", VALUE_DTYPE, count),
        ]
    if spec.columns:
        kept = spec.columns.count(cols)
        found += [("column_index", INDEX_DTYPE, (kept,)), ("column_values", spec.columns.torch_dtype, (rows, kept))]
    return found


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """The storage of plainly stored scales."""
    assert isinstance(spec.scale, Format)
    return float_dtype(spec.scale)


def float_dtype(format: Format) -> torch.dtype:
    """The torch dtype of a format that is a storage dtype."""
    dtype = format.torch_dtype if isinstance(format, FloatFormat) else None
    assert dtype is not None
    return dtype


def zero_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of zero points, before they are packed."""
    if spec.zero_point == "integer":
        return spec.format.code_dtype
    storage = spec.scale_format
    return storage.torch_dtype or torch.float32 if isinstance(storage, FloatFormat) else torch.float32


def pack_qtensor(q: QTensor | PackedMatrix) -> dict[str, Tensor]:
    """The tensors of a QTensor [out, in], each contiguous."""
    if isinstance(q, QTensor):
        q = PackedMatrix.of(q)
    found = {"codes": q.words if q.spec.format.bits > 8 else q.words_as(torch.uint8)}
    if isinstance(q.scale, QTensor):
        found["scale"] = _pack(q.scale.unsigned_codes(), q.scale.spec.format)
        assert isinstance(q.scale.scale, Tensor)
        found["outer_scale"] = q.scale.scale
        if q.scale.zero is not None:
            found["outer_zero"] = _pack_zero(q.scale.zero, q.scale.spec)
        if isinstance(q.scale.minimum, Tensor):
            found["outer_minimum"] = q.scale.minimum
    else:
        found["scale"] = q.scale
    if q.zero is not None:
        found["zero"] = _pack_zero(q.zero, q.spec)
    if isinstance(q.minimum, QTensor):
        found["minimum"] = _pack(q.minimum.unsigned_codes(), q.minimum.spec.format)
        assert isinstance(q.minimum.scale, Tensor)
        found["minimum_scale"] = q.minimum.scale
    elif q.minimum is not None:
        found["minimum"] = q.minimum
    if q.order is not None:
        found["order"] = q.order
    if q.outliers is not None:
        found["outlier_starts"] = q.outliers.starts
        found["outlier_columns"] = q.outliers.columns
        found["outlier_values"] = q.outliers.values
    if q.columns is not None:
        found["column_index"], found["column_values"] = q.columns.index, q.columns.values
    return {suffix: tensor.contiguous() for suffix, tensor in found.items()}


@dataclass(frozen=True)
class PackedMatrix:
    """A QTensor [out, in] whose codes are packed; everything else is as there.

    words  uint8 or int32 [out, ..]: unsigned codes, packed along the rows by `numerics.packing`; int32 [out, in] for
           formats of more than 8 bits
    """

    words: Tensor
    scale: Tensor | QTensor
    zero: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]
    outliers: Outliers | None = None
    columns: Columns | None = None
    minimum: Tensor | QTensor | None = None
    order: Tensor | None = None

    @staticmethod
    def of(q: QTensor) -> PackedMatrix:
        """A QTensor of rank 2, packed."""
        rows, cols = q.shape
        words = _pack(q.unsigned_codes(), q.spec.format)
        more = (q.outliers, q.columns, q.minimum, q.order)
        return PackedMatrix(words, q.scale, q.zero, q.spec, (rows, cols), *more)

    def words_as(self, word: torch.dtype) -> Tensor:
        """The words in another dtype, uint8 or int32; only for formats of at most 8 bits."""
        return rewrap(self.words, self.spec.format.bits, self.shape[1], word)

    def unpack(self) -> QTensor:
        """The QTensor."""
        codes = _unpack(self.words, self.spec.format, self.shape[1])
        more = (self.outliers, self.columns, self.minimum, self.order)
        return QTensor(codes, self.scale, self.zero, self.spec, *more)


def unpack_qtensor(stored: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    """The inverse of `pack_qtensor`, for a matrix of `shape`."""
    return packed_matrix(stored, spec, shape).unpack()


def packed_matrix(stored: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> PackedMatrix:
    """The same with its codes left packed."""
    across = spec.granularity.tiles(shape)[1]
    scale: Tensor | QTensor = stored["scale"]
    if isinstance(spec.scale, QuantSpec):
        inner = spec.scale
        values = _unpack(stored["scale"], inner.format, across)
        outer_across = inner.granularity.tiles(tuple(values.shape))[1]
        outer_zero = _unpack_zero(stored.get("outer_zero"), inner, outer_across)
        scale = QTensor(values, stored["outer_scale"], outer_zero, inner, minimum=stored.get("outer_minimum"))
    outliers = None
    if spec.outliers:
        outliers = Outliers(stored["outlier_starts"], stored["outlier_columns"], stored["outlier_values"])
        steps = outliers.starts.diff()
        whole = int(outliers.starts[0]) == 0 and int(outliers.starts[-1]) == len(outliers.columns)
        if not whole or bool((steps < 0).any().item()) or not _within(outliers.columns, shape[1]):
            raise NumericsError(f"outliers lie outside of the {shape[0]} x {shape[1]} matrix: the file is damaged")
    columns = Columns(stored["column_index"], stored["column_values"]) if spec.columns else None
    if columns is not None and not _within(columns.index, shape[1]):
        raise NumericsError(f"kept columns lie outside of the {shape[0]} x {shape[1]} matrix: the file is damaged")
    zero = _unpack_zero(stored.get("zero"), spec, across)
    minimum: Tensor | QTensor | None = stored["minimum"] if spec.minimum is not None else None
    if isinstance(spec.minimum, QuantSpec):
        codes = _unpack(stored["minimum"], spec.minimum.format, across)
        minimum = QTensor(codes, stored["minimum_scale"], None, spec.minimum)
    order = stored["order"] if spec.ordered else None
    if order is not None:
        check_order(order, shape[1], "a matrix")
    return PackedMatrix(stored["codes"], scale, zero, spec, shape, outliers, columns, minimum, order)


def check_order(order: Tensor, cols: int, name: str) -> None:
    """NumericsError unless `order` names each of `cols` columns once."""
    if not torch.equal(order.to(torch.int64).sort().values, torch.arange(cols, device=order.device)):
        raise NumericsError(f"{name}: the order of its {cols} columns does not name each once: the file is damaged")


def _within(index: Tensor, cols: int) -> bool:
    return not index.numel() or 0 <= int(index.amin()) <= int(index.amax()) < cols


def _pack(unsigned_codes: Tensor, format: Format) -> Tensor:
    return pack(unsigned_codes, format.bits, torch.uint8) if format.bits <= 8 else unsigned_codes


def _unpack(stored: Tensor, format: Format, cols: int) -> Tensor:
    """The codes, in their own dtype, of what `_pack` gave."""
    if format.bits > 8:
        return (stored - format.code_offset).to(format.code_dtype)
    codes = unpack(stored, format.bits, cols)
    if format.code_dtype is not torch.int8:
        return codes.to(format.code_dtype)
    return (codes - format.code_offset).view(torch.int8)  # two's complement: right modulo 256


def _pack_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    return zero if spec.zero_point == "real" else _pack(unsigned(zero, spec.format), spec.format)


def _unpack_zero(stored: Tensor | None, spec: QuantSpec, cols: int) -> Tensor | None:
    return stored if stored is None or spec.zero_point == "real" else _unpack(stored, spec.format, cols)


def _packed(format: Format, shape: tuple[int, int]) -> tuple[torch.dtype, tuple[int, int]]:
    """dtype and shape of what `_pack` gives for codes of `shape`."""
    if format.bits > 8:
        return torch.int32, shape
    return torch.uint8, (shape[0], packed_length(shape[1], format.bits, torch.uint8))


def _zeros(spec: QuantSpec, shape: tuple[int, int]) -> tuple[torch.dtype, tuple[int, int]]:
    return _packed(spec.format, shape) if spec.zero_point == "integer" else (zero_dtype(spec), shape)
