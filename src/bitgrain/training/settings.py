"""How quantization-aware training walks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from bitgrain.errors import SchemeError

Objective = Literal["distill", "next_token"]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of `tuning.training`, and of `bitgrain train`.

    steps       gradient steps
    batch       windows of text in one step; at_once: how many of them run through the model together (memory)
    text        the text to train on, as in `recipes.Calibration`; empty: that of the calibration
    windows     of it that are used, 0 for all; seqlen: tokens in one, 0 for as many as in the calibration
    rate        of latent weights, in steps of the grid
    scale_rate  of scales, in steps by which the end of the grid moves: 2**(bits - 1) times the relative change, as in
                `EndToEndSettings`; 0 leaves them as they are
    zero_rate   of real zero points, in steps of the grid; 0 leaves them as they are
    extra_rate  of the norms' gains, times the mean of 2**(1 - bits) over the weights; 0 leaves them as they are
    loss        "distill": KL divergence from the full-precision model's predictions; "next_token": cross-entropy
    warmup      steps over which the rates grow to their full size; after it they fall to zero as a cosine does
    validation  windows that are held back, on which states are compared (fewer where the text is short)
    checks      how often a state is measured on them
    autocast    whether the loss runs in bfloat16, where the hardware multiplies it natively
    seed        of the order of the windows
    """

    steps: int = 450
    batch: int = 4
    at_once: int = 1
    text: str = ""
    windows: int = 0
    seqlen: int = 0
    rate: float = 0.003
    scale_rate: float = 0.008
    zero_rate: float = 0.003
    extra_rate: float = 0.008
    loss: Objective = "distill"
    warmup: int = 10
    validation: int = 16
    checks: int = 10
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Objective):
            raise SchemeError(f"training.loss is distill or next_token, not {self.loss!r}")
        at_least_1 = ("batch", "at_once", "checks")
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and (value < (field.name in at_least_1) or not math.isfinite(value))
            ):
                raise SchemeError(f"training.{field.name} is at least {int(field.name in at_least_1)}, not {value}")

    def factor(self, step: int) -> float:
        """By which the rates are multiplied in `step` (from 0)."""
        growing = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return growing * 0.5 * (1 + math.cos(math.pi * step / self.steps))
