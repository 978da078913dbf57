"""The grids of numbers that native loops round to: integers, small floats, tables of up to 16 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitgrain.errors import KernelError
from bitgrain.kernels.native import native

LARGEST_TABLE = 16


def integer_grid(low: float, high: float) -> Any:
    """All integers from low to high; ties go to even."""
    return native().Grid(0, low, high, 0.0, 0.0, [], [])


def float_grid(highest: float, smallest: float, mantissa_bits: int) -> Any:
    """Floats with a sign up to `highest`; ties go to the even mantissa.

    smallest  the smallest normal number; the steps between subnormal numbers are those above it
    """
    return native().Grid(1, -highest, highest, smallest, 2.0**-mantissa_bits, [], [])


def table_grid(values: Sequence[float], above: Sequence[float]) -> Any:
    """`values`, ascending, at most 16; x > above[i] rounds to values[i + 1] or more. Raises KernelError for more."""
    if not 2 <= len(values) <= LARGEST_TABLE or len(above) != len(values) - 1:
        raise KernelError(f"a table has 2 to {LARGEST_TABLE} numbers and one limit fewer, not {len(values)}")
    return native().Grid(2, 0.0, 0.0, 0.0, 0.0, list(values), list(above))
