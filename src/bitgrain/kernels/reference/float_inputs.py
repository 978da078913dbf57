"""The twin of rounding inputs to float formats of a few bits (`kernels.float_inputs`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.float_inputs import FORMATS, FloatInputs, Grid


def round_inputs(x: Tensor, inputs: FloatInputs, group: int | None = None) -> tuple[Tensor, Tensor]:
    """v [m, k] of the format, and the scale that each stands with, [m, k]; both float32.

    group  of the weight's inputs; the last one of a row may be shorter
    A run with NaN or Inf has the scale NaN, which its outputs become.
    """
    x = x.to(torch.float32)
    k = x.shape[1]
    run = k if not inputs.groups or group is None else group
    padded = torch.nn.functional.pad(x, (0, -k % run)).unflatten(1, (-1, run))
    steps = _steps(padded.abs().amax(-1, keepdim=True), inputs)
    values = round_to_grid(padded / steps, inputs.grid)
    finite = torch.isfinite(padded).all(-1, keepdim=True)
    steps = torch.where(finite, steps, torch.nan).expand_as(padded)
    return values.nan_to_num_().flatten(1)[:, :k], steps.flatten(1)[:, :k]


def round_to_grid(x: Tensor, grid: Grid) -> Tensor:
    """The nearest number of the format, ties to even; beyond its ends these."""
    x = x.clamp(-grid.largest, grid.largest)
    power = torch.frexp(x).exponent - 1  # of two, at or below |x|
    step = torch.ldexp(torch.ones_like(x), power).clamp(min=grid.least) * 2.0**-grid.mantissa_bits
    return torch.round(x / step) * step


def _steps(most: Tensor, inputs: FloatInputs) -> Tensor:
    """Scales of runs whose largest magnitudes are `most`."""
    if inputs.scale == "fixed":
        return torch.full_like(most, inputs.outer)
    grid, plain = inputs.grid, most / inputs.grid.largest
    empty = ~(plain > 0)
    if inputs.scale == "float32":
        return plain.masked_fill(empty, 1.0)
    if inputs.scale == "e8m0":
        mantissa, exponent = torch.frexp(plain)
        exponent = exponent + torch.frexp(mantissa * grid.largest / grid.overflow).exponent
        return torch.ldexp(torch.ones_like(plain), exponent.clamp(-127, 127)).masked_fill(empty, 1.0)
    e4m3 = FORMATS["fp8_e4m3"]
    code = round_to_grid(plain / inputs.outer, e4m3).clamp(min=e4m3.least * 2.0**-e4m3.mantissa_bits)
    return code.masked_fill(empty, 1.0) * inputs.outer
