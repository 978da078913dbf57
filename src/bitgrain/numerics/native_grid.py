"""Formats as the native loops know them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from bitgrain.kernels.grid import LARGEST_TABLE, float_grid, integer_grid, table_grid
from bitgrain.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


def native_grid(spec: QuantSpec) -> Any | None:
    """The numbers of `spec` for a kernel, with its rounding; None for formats that no kernel rounds to.

    Integers, floats of up to 8 bits, codebooks of up to 16 numbers. Needs the native module.
    """
    return _grid(spec.format, spec.low, spec.high)


@cache
def _grid(format: Format, low: float, high: float) -> Any | None:
    match format:
        case IntFormat():
            return integer_grid(low, high)
        case FloatFormat() if format.is_signed and format.subnormals and format.bits <= 8:
            return float_grid(format.maximum, 2.0**format.smallest_exponent, format.mantissa_bits)
        case CodebookFormat() if len(format.values) <= LARGEST_TABLE:
            return table_grid(format.values, format.middles().tolist())
        case _:
            return None
