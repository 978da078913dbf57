"""A matrix's QTensor as a few named, densely packed tensors, and back: what files hold, and layers that stay low-bit.

codes           uint8 [out, ceil(in * bits / 8)], low bits first, as code + offset; int32 [out, in] above 8 bits
scale           storage dtype [tiles down, tiles across]; nested scales: their codes, packed like `codes`
outer_scale     only for nested scales: the scale of the scales; outer_zero: only for asymmetric ones
zero            only with zero points: codes packed like `codes`, or numbers in the storage dtype
outlier_starts, outlier_columns, outlier_values   only with outliers, see `numerics.outliers`
column_index, column_values   only with columns in 16 bits, see `numerics.columns`
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitgrain.numerics.columns import Columns
from bitgrain.numerics.formats import Format
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.packing import pack, unpack
from bitgrain.numerics.qtensor import QTensor, unsigned
from bitgrain.numerics.spec import QuantSpec


def pack_qtensor(q: QTensor) -> dict[str, Tensor]:
    """The tensors of a QTensor [out, in], each contiguous."""
    found = {"codes": _pack(q.unsigned_codes(), q.spec.format)}
    if isinstance(q.scale, QTensor):
        found["scale"] = _pack(q.scale.unsigned_codes(), q.scale.spec.format)
        assert isinstance(q.scale.scale, Tensor)
        found["outer_scale"] = q.scale.scale
        if q.scale.zero is not None:
            found["outer_zero"] = _pack_zero(q.scale.zero, q.scale.spec)
    else:
        found["scale"] = q.scale
    if q.zero is not None:
        found["zero"] = _pack_zero(q.zero, q.spec)
    if q.outliers is not None:
        found["outlier_starts"] = q.outliers.starts
        found["outlier_columns"] = q.outliers.columns
        found["outlier_values"] = q.outliers.values
    if q.columns is not None:
        found["column_index"], found["column_values"] = q.columns.index, q.columns.values
    return {suffix: tensor.contiguous() for suffix, tensor in found.items()}


def unpack_qtensor(stored: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    """The inverse of `pack_qtensor`, for a matrix of `shape`."""
    across = spec.granularity.tiles(shape)[1]
    codes = _unpack(stored["codes"], spec.format, shape[1])
    scale: Tensor | QTensor = stored["scale"]
    if isinstance(spec.scale, QuantSpec):
        inner = spec.scale
        values = _unpack(stored["scale"], inner.format, across)
        outer_across = inner.granularity.tiles(tuple(values.shape))[1]
        outer_zero = _unpack_zero(stored.get("outer_zero"), inner, outer_across)
        scale = QTensor(values, stored["outer_scale"], outer_zero, inner)
    outliers = None
    if spec.outliers:
        outliers = Outliers(stored["outlier_starts"], stored["outlier_columns"], stored["outlier_values"])
    columns = Columns(stored["column_index"], stored["column_values"]) if spec.columns else None
    return QTensor(codes, scale, _unpack_zero(stored.get("zero"), spec, across), spec, outliers, columns)


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
