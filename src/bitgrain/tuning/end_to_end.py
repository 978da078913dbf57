"""End-to-end tuning: scales and other small parameters such that the quantized model's loss is least.

Codes stay; scales (as factors) and whatever the caller adds, the norms' gains above all, follow the gradient of a loss
of the whole model, best the KL divergence of its predictions from the full-precision model's. This is the second phase
of EfficientQAT (arXiv 2407.11062, section 3.3) with distillation in place of the next-token loss: there are as many
parameters as scales, so a few dozen steps on a few windows are enough and little can be fitted to noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics import QTensor
from bitgrain.tuning.descent import Decay, Loss, Report, Schedule, descend
from bitgrain.tuning.learned import Learn, learned_weights, scale_unit


@dataclass(frozen=True)
class EndToEndSettings:
    """How scales are tuned; a batch of calibration text should hold about 4 windows.

    steps       gradient steps
    scale_rate  of the scales, in steps by which the end of the grid moves: 2**(bits - 1) times the relative change
    extra_rate  of the extra parameters, times the mean of 4**(1 - bits) over the weights: gains of norms fit the
                calibration text's domain too, which pays only where there is much error to make up for; 0 leaves them
    zero_rate   of real zero points, in steps of the grid; 0 leaves them as they are
    code_rate   of the codes' offsets; 0 leaves the codes as they are (they fit the calibration text and little else)
    autocast    whether the loss runs in bfloat16, where the hardware multiplies it natively
    warmup, decay, batch_size, validation, checks, seed   see `Schedule`
    """

    steps: int = 40
    scale_rate: float = 0.012
    extra_rate: float = 0.024
    zero_rate: float = 0.0
    code_rate: float = 0.0
    warmup: int = 5
    decay: Decay = "linear"
    batch_size: int = 1
    validation: int = 4
    checks: int = 2
    seed: int = 0
    autocast: bool = False

    def schedule(self, extra_unit: float = 1.0) -> Schedule:
        """The walk that these settings mean; `extra_unit` multiplies the extras' rate.

        Raises SchemeError for impossible settings.
        """
        rates = {"scales": self.scale_rate, "shifts": self.zero_rate, "offsets": self.code_rate}
        if self.extra_rate:
            rates["extras"] = self.extra_rate * extra_unit
        return Schedule(
            steps=self.steps,
            rates=rates,
            optimizer="adam",
            warmup=self.warmup,
            decay=self.decay,
            batch_size=self.batch_size,
            validation=self.validation,
            checks=self.checks,
            seed=self.seed,
        )


@dataclass(frozen=True)
class EndToEndResult:
    """What was found.

    qtensors    as many and in the same order as the start
    extras      the extra parameters in their own dtypes
    first_loss  of the start, mean over the validation batches
    best_loss   of what is returned, as it will be written; never above first_loss
    steps       after how many steps it was reached; 0: the start is returned
    """

    qtensors: dict[str, QTensor]
    extras: dict[str, Tensor]
    first_loss: float
    best_loss: float
    steps: int


def tune_end_to_end(
    start: Mapping[str, QTensor],
    extras: Mapping[str, Tensor],
    loss: Loss,
    batches: int,
    settings: EndToEndSettings | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    progress: Report | None = None,
) -> EndToEndResult:
    """Tune the scales of a whole quantized model together.

    start     all quantized weights by name
    extras    other parameters by name that may be tuned: gains of norms, biases
    loss      (dense float32 weights, float32 extras, i) -> scalar, differentiable: the loss on calibration batch i
    batches   how many calibration batches there are
    weights   the original weights, used only where codes are learned
    progress  called with (steps done, loss of the last step)
    Weights of which nothing can be learned (nested scales) keep their start. Deterministic given the seed, as far as
    `loss` is. Raises NumericsError if a loss is not finite, SchemeError for impossible settings.
    """
    chosen = settings or EndToEndSettings()
    learn = Learn(chosen.code_rate > 0, "factor" if chosen.scale_rate else "kept", chosen.zero_rate > 0)
    views = dict(learned_weights(start, learn, weights))

    def measured(dense: Mapping[str, Tensor], extra: Mapping[str, Tensor], index: int) -> Tensor:
        device = next((tensor.device.type for tensor in [*dense.values(), *extra.values()]), "cpu")
        with torch.autocast(device, torch.bfloat16, enabled=chosen.autocast):
            return loss(dense, extra, index)

    elements = sum(q.codes.numel() for q in start.values())
    unit = sum(q.codes.numel() * scale_unit(q) ** 2 for q in start.values()) / max(1, elements)
    found = descend(start, views, extras, measured, batches, chosen.schedule(unit), progress)
    return EndToEndResult(found.qtensors, found.extras, found.first_loss, found.best_loss, found.best_step)
