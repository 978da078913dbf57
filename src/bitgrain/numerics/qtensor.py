"""QTensor: codes, scales, zero points, outliers and kept columns, and the spec that gives them their meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.affine import from_grid
from bitgrain.numerics.columns import Columns
from bitgrain.numerics.formats import Format
from bitgrain.numerics.granularity import from_tiles, matrix_shape, to_tiles
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.scales import decode_scale
from bitgrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor.

    codes     one code for each element, in the tensor's own shape, dtype `spec.format.code_dtype`
    scale     [tiles down, tiles across] in the storage dtype, or a QTensor of that shape (double quantization)
    zero      None if symmetric; "integer": codes [down, across]; "real": [down, across] in the scale's dtype
    outliers  what is added to some elements; None unless the spec has some
    columns   what stands in the place of some columns; None unless the spec has some
    minimum   [tiles down, tiles across] in its storage dtype, or a QTensor of that shape; None unless the spec has some
    order     int32 [in]: the input channel that each column of the codes is for; None unless the spec is ordered
    Raises SchemeError where a spec has columns, minima or an order and there are none.
    """

    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | None
    spec: QuantSpec
    outliers: Outliers | None = None
    columns: Columns | None = None
    minimum: Tensor | QTensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.spec.columns is not None and self.columns is None:
            raise SchemeError(f"{self.spec.describe()}: no columns were kept; solve it by solvers.beside.solve_matrix")
        if (self.minimum is not None) != (self.spec.minimum is not None):
            raise SchemeError(f"{self.spec.describe()}: {'no' if self.minimum is None else 'there are'} minima")
        if (self.order is not None) != self.spec.ordered:
            raise SchemeError(
                f"{self.spec.describe()}: {'no' if self.order is None else 'there is an'} order of columns"
            )

    @staticmethod
    def of(
        codes: Tensor, scale: Tensor | QTensor, offset: Tensor | QTensor | None, spec: QuantSpec, **more: Any
    ) -> QTensor:
        """`offset`: zero points or minima, whichever the spec has; `more`: other fields."""
        if spec.minimum is not None:
            return QTensor(codes, scale, None, spec, minimum=offset, **more)
        assert offset is None or isinstance(offset, Tensor)
        return QTensor(codes, scale, offset, spec, **more)

    @property
    def offset(self) -> Tensor | QTensor | None:
        """Zero points or minima as stored; None if symmetric."""
        return self.zero if self.minimum is None else self.minimum

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s * (v - z), or s * v - m, and its outlier, or what was kept, for each element: in float32, rounded once to
        `dtype`."""
        values = self.spec.format.decode(to_tiles(self.codes, self.spec.granularity))
        values = from_grid(values, scale_values(self.scale), self.zero)
        if self.minimum is not None:
            values = values.sub_(scale_values(self.minimum).unsqueeze(-1))
        dense = from_tiles(values, self.spec.granularity, self.shape)
        if self.order is not None:
            dense = torch.empty_like(dense).index_copy_(1, self.order.to(torch.int64), dense)
        if self.outliers is not None:
            dense = self.outliers.add_to(dense.reshape(matrix_shape(self.shape))).view(self.shape)
        if self.columns is not None:
            dense = self.columns.put_into(dense.reshape(matrix_shape(self.shape))).view(self.shape)
        return dense.to(dtype)

    def unsigned_codes(self) -> Tensor:
        """The codes in [0, 2**bits), as they are packed: uint8 (int32 for formats of more than 8 bits)."""
        return unsigned(self.codes, self.spec.format)

    def count_bits(self) -> int:
        """Bits of codes, scales, zero points, outliers and kept columns, densely packed."""
        return self.spec.count_bits(self.shape)


def unsigned(codes: Tensor, format: Format) -> Tensor:
    """Codes (or zero points that are codes) of `format` in [0, 2**bits): uint8, int32 for more than 8 bits."""
    if format.bits > 8:
        return codes.to(torch.int32) + format.code_offset
    plain = codes.view(torch.uint8)  # two's complement: the sum modulo 256 is right for negative codes
    return plain + format.code_offset if format.code_offset else plain


def scale_values(stored: Tensor | QTensor) -> Tensor:
    """Stored scales, plain or nested, as float32 [down, across]."""
    return decode_scale(stored) if isinstance(stored, Tensor) else stored.dequantize()
