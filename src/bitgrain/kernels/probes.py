"""How fast this machine can be, by the same thread pool as the kernels: what their speed is a part of.

A machine that others use too changes from minute to minute; measure these beside what they are compared with.
"""

from __future__ import annotations

from torch import Tensor

from bitgrain.kernels.native import native


def measure_bandwidth(memory: Tensor, threads: int) -> float:
    """Bytes per second of `threads` threads that read all of `memory` once, from wherever it is.

    For memory's own bandwidth give much more than the caches hold, written to before. Raises KernelError without the
    native module, as the others do.
    """
    return native().measure_bandwidth(memory.data_ptr(), memory.nbytes, threads)


def measure_int8_peak(threads: int) -> float:
    """Products of bytes, each added to a 32-bit sum, per second of `threads` threads, operands in registers."""
    return native().measure_int8_peak(threads)


def measure_bf16_peak(threads: int) -> float:
    """The same of bfloat16 numbers, added to float32; of float32 ones where the level has no instruction for them."""
    return native().measure_bf16_peak(threads)
