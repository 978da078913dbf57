"""What tests of kernels share."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from bitgrain.kernels.native import is_available, native

LEVELS: list[str] = native().isas() if is_available() else []
"""Instruction sets that were built and that this machine has."""
VECTOR_LEVELS = [name for name in LEVELS if name != "amx"]
"""Those with functions of their own for everything; amx has those of avx512vnni, but for many rows."""


@contextmanager
def level(name: str) -> Generator[None]:
    """The kernels of one instruction set."""
    before = native().isa()
    native().use_isa(name)
    try:
        yield
    finally:
        native().use_isa(before)


@contextmanager
def threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
