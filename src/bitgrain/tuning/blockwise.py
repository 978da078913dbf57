"""Block-wise tuning: codes and scales such that a block's output comes nearest to the full-precision block's.

SignRound (AutoRound, arXiv 2309.05516): V in [-0.5, 0.5] is added to W / s before rounding and the limits of each tile
are multiplied by learned factors; both are trained by signed gradient descent on the mean squared error of the block's
output, with rate 1 / steps that falls linearly (the paper's equations 3 to 5 and section 3.2). Started from codes that
another solver found, V starts at these.

Layer-by-layer knowledge distillation (LKD, ZeroQuant, arXiv 2206.01861, section 4.2) walks the same way with W itself
in place of V: `free`, with Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor
from bitgrain.numerics.sums import row_sums
from bitgrain.tuning.descent import Decay, Optimizer, Report, Schedule, descend
from bitgrain.tuning.learned import Learn, ScaleMode, learned_weights


@dataclass(frozen=True)
class BlockSettings:
    """How a block is tuned. The defaults are the authors' (200 steps on 8 windows each, rates 1 / steps).

    steps        gradient steps
    optimizer    "sign" or "adam"
    codes        whether codes are learned; `scales`: "range", "factor" or "kept" (see `tuning.learned`)
    free         whether an offset may exceed half a step, so that the weights themselves are learned
    rate         of the codes' offsets, in steps of the grid; 0 takes 1 / steps
    scale_rate   of the limits' factors ("range") or, in steps of the grid's end, of the scales ("factor"); 0: as `rate`
    batch_size   calibration batches in one step: 8 where a batch is one window
    validation   batches on which states are compared; 0 takes all
    checks       how often a state is measured
    """

    steps: int = 200
    optimizer: Optimizer = "sign"
    codes: bool = True
    scales: ScaleMode = "range"
    free: bool = False
    rate: float = 0.0
    scale_rate: float = 0.0
    decay: Decay = "linear"
    batch_size: int = 8
    validation: int = 32
    checks: int = 5
    seed: int = 0

    def schedule(self) -> Schedule:
        """The walk that these settings mean. Raises SchemeError for impossible ones."""
        rate = self.rate or 1 / max(1, self.steps)
        scales = self.scale_rate or rate
        return Schedule(
            steps=self.steps,
            rates={"offsets": rate, "scales": scales, "lows": scales, "shifts": scales},
            optimizer=self.optimizer,
            decay=self.decay,
            batch_size=self.batch_size,
            validation=self.validation,
            checks=self.checks,
            seed=self.seed,
        )


AUTO_ROUND = BlockSettings()
"""The authors' settings, for a start from round-to-nearest and batches of one window of calibration text."""


@dataclass(frozen=True)
class TuneResult:
    """What was found for a block.

    qtensors    as many and in the same order as the start
    first_loss  mean squared error of the block's output with the start, over the validation batches
    best_loss   with what is returned; never above first_loss
    steps       after how many steps it was reached; 0: the start is returned
    """

    qtensors: dict[str, QTensor]
    first_loss: float
    best_loss: float
    steps: int


def tune_block(
    weights: Mapping[str, Tensor],
    start: Mapping[str, QTensor],
    output: Callable[[Mapping[str, Tensor], int], Tensor],
    target: Callable[[int], Tensor],
    batches: int,
    settings: BlockSettings = AUTO_ROUND,
    progress: Report | None = None,
) -> TuneResult:
    """Tune the quantized weights of one block together.

    weights   the original weights [out, in] by name: what is rounded anew
    start     by the same names: where to start from (round-to-nearest, GPTQ, ...)
    output    (dense float32 weights by name, i) -> the block's output on calibration batch i, differentiable
    target    (i) -> what it should be, same shape
    batches   how many calibration batches there are
    progress  called with (steps done, loss of the last step)
    Weights of which nothing can be learned (see `Learn`) keep their start. Deterministic given the seed, as far as
    `output` is. Raises SchemeError if a weight is missing, NumericsError if a loss is not finite.
    """
    missing = sorted(set(start) - set(weights))
    if missing:
        raise SchemeError(f"tuning needs the original weight of {', '.join(missing)}")
    views = dict(learned_weights(start, Learn(settings.codes, settings.scales, free=settings.free), weights))

    def loss(dense: Mapping[str, Tensor], extras: Mapping[str, Tensor], index: int) -> Tensor:
        return mean_squared_error(output(dense, index), target(index))

    found = descend(start, views, {}, loss, batches, settings.schedule(), progress)
    return TuneResult(found.qtensors, found.first_loss, found.best_loss, found.best_step)


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (output - target)^2, added up in float64 in an order that no number of threads changes."""
    error = output.to(torch.float32) - target.to(torch.float32)
    return row_sums(error.square().reshape(1, -1)).sum() / max(1, error.numel())
