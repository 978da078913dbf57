"""One place that turns `--device` into a torch device."""

from __future__ import annotations

import torch

from bitgrain.errors import PlanError


def resolve_device(name: str = "auto") -> torch.device:
    """auto: the GPU if there is one, else the CPU; or any device that torch knows (cpu, cuda, cuda:1, mps).

    Raises PlanError when it is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"unknown device {name!r}; write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise PlanError(f"device {name} is not here (torch sees {torch.cuda.device_count()} GPUs); use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PlanError("device mps is not here; use --device cpu")
    return device
