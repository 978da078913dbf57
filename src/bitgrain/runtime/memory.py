"""Memory that is freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h of the GNU C library
_THRESHOLD = 3 << 20
"""At 1 MiB a job spends a fifth of its time on fresh pages; at 5 MiB it keeps twice the memory."""

_SMALL = 256 << 10


def return_freed_memory() -> None:
    """Let the GNU C library give large blocks back as soon as they are freed; elsewhere this does nothing.

    By itself it raises the size from which it does so to that of the largest block freed so far, up to 32 MiB. A job
    whose threads free tensors of many megabytes in any order then keeps twice the memory that it uses.
    """
    _set({_M_MMAP_THRESHOLD: _THRESHOLD})


@contextmanager
def no_holes() -> Generator[None]:
    """While many large blocks come and go between ones that stay: they are mapped, and leave no holes in the heap.

    Afterwards the thresholds are those that the library itself comes to after some large blocks were freed.
    """
    _set({_M_MMAP_THRESHOLD: _SMALL})
    try:
        yield
    finally:
        _set({_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20})


def _set(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, value in options.items():
            mallopt(name, value)
