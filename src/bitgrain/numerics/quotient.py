"""Division by a plain number, with the same bits on every device."""

from __future__ import annotations

from torch import Tensor


def quotient(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once; x float32 or float64.

    On CUDA torch multiplies by the reciprocal of a Python number instead, which is off in the last bit: scales, and the
    files of a job, would depend on the device.
    """
    return x / x.new_full((), number)
