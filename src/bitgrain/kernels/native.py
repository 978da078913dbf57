"""The native module, if it was built: which instruction set it runs, and one clear error where it is missing."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError

try:
    from bitgrain import _native as _module  # type: ignore[attr-defined]
except ImportError as error:
    _module = None
    _why = str(error)
else:
    _why = ""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types at the seam, as native/common.h numbers them."""


def is_available() -> bool:
    """Whether the native module is here."""
    return _module is not None


def native() -> Any:
    """The native module. Raises KernelError where it was not built, or BITGRAIN_ISA asks for what is not here."""
    if _module is None:
        raise KernelError(
            f"the native kernels are not here ({_why}): with a C++17 compiler at hand, `make native` builds them in "
            "a checkout and `pip install .` elsewhere; or ask for execution='reference'"
        )
    return _module


_held_back = False


def serves(*tensors: Tensor) -> bool:
    """Whether work that torch could do as well goes to the native module, for tensors on the CPU."""
    return _module is not None and not _held_back and all(tensor.device.type == "cpu" for tensor in tensors)


@contextmanager
def torch_only() -> Generator[None]:
    """Inside, in all threads, torch does what it can do as well: to compare both. What only kernels do still runs."""
    global _held_back
    before, _held_back = _held_back, True
    try:
        yield
    finally:
        _held_back = before


def check_isa() -> None:
    """Raises KernelError if the environment variable BITGRAIN_ISA names a level that is not here."""
    wanted = os.environ.get("BITGRAIN_ISA")
    if wanted and _module is not None and wanted not in _module.isas():
        raise KernelError(
            f"BITGRAIN_ISA={wanted} is not here; this machine and build have: {', '.join(_module.isas())}"
        )


def isa() -> str:
    """The instruction set that runs: amx, avx512bf16, avx512vnni, avxvnni, avx2, neon or portable."""
    return native().isa()


def address_of(tensor: Tensor | None) -> int:
    """Where its memory begins, for the native module; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor, features: int) -> Tensor:
    """x [..., features] as rows that lie whole in memory. Raises KernelError for another width, dtype or device."""
    if x.shape[-1] != features:
        raise KernelError(f"inputs have {x.shape[-1]} features, the weight has {features}")
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise KernelError(f"CPU kernels take float32, bfloat16 or float16 on the CPU, not {x.dtype} on {x.device}")
    x = x.reshape(-1, features)
    return x if x.stride(-1) == 1 else x.contiguous()


check_isa()
