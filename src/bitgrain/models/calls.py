"""Running any torch module on a batch: what a module is called with, in one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def call(module: nn.Module, batch: Any) -> Any:
    """`module` on a tensor, on a tuple or list of arguments, or on a mapping of keywords."""
    if isinstance(batch, Mapping):
        return module(**{str(key): value for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return module(*cast(Sequence[Any], batch))
    return module(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The same with all of its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(value, device) for value in batch)
    return batch


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter is; the CPU for a module without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
