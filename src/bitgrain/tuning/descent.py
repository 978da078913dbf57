"""Gradient descent over learned weights: one loop for block-wise and end-to-end tuning.

The caller's loss sees plain dense weights; their gradients are handed on to the learned parameters here, once for each
step. What is kept is the best state that was measured as it will be written, on the same batches each time, and the
start is one of the states: the result is never worse than the start on that measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QTensor
from bitgrain.tuning.learned import LearnedWeight

Optimizer = Literal["sign", "adam"]
Decay = Literal["linear", "cosine"]
Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], Tensor]
"""(dense weights, extra parameters, calibration batch) -> scalar."""
Report = Callable[[int, float], None]
"""(steps done, loss of the last step)."""


@dataclass(frozen=True)
class Schedule:
    """How a descent walks.

    steps       gradient steps
    rates       of each kind of parameter: offsets, scales, lows, shifts, extras; a kind without one is left as it is
    optimizer   "sign": p -= rate * sign(gradient); "adam": betas (0.9, 0.99)
    warmup      steps over which the rates grow to their full size
    decay       "linear" or "cosine", to zero at the end
    batch_size  calibration batches whose gradients are averaged in a step
    validation  calibration batches, evenly spread over all, on which states are compared; 0 takes all of them
    checks      how often within the descent a state is measured
    seed        of the order of the batches
    """

    steps: int
    rates: Mapping[str, float]
    optimizer: Optimizer
    warmup: int = 0
    decay: Decay = "linear"
    batch_size: int = 1
    validation: int = 8
    checks: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Optimizer) or self.decay not in get_args(Decay):
            raise SchemeError(f"tuning knows the optimizers sign and adam, the decays linear and cosine, not {self}")
        if self.steps < 0 or self.warmup < 0 or self.batch_size < 1 or self.validation < 0 or self.checks < 1:
            raise SchemeError(
                f"tuning: steps, warmup, validation >= 0 and batch_size, checks >= 1 are needed, not {self}"
            )
        if any(not math.isfinite(rate) or rate < 0 for rate in self.rates.values()):
            raise SchemeError(f"tuning: rates are finite and not negative, not {dict(self.rates)}")

    def factor(self, step: int) -> float:
        """By which the rates are multiplied in `step` (from 0)."""
        progress = step / self.steps
        falling = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / self.warmup) * falling if self.warmup else falling


@dataclass(frozen=True)
class Descent:
    """What a descent led to.

    qtensors, extras  the best state measured, in storage
    first_loss        of the start, mean over the validation batches
    best_loss         of what is returned; at most first_loss
    best_step         after how many steps it was reached; 0 is the start itself
    """

    qtensors: dict[str, QTensor]
    extras: dict[str, Tensor]
    first_loss: float
    best_loss: float
    best_step: int


def descend(
    start: Mapping[str, QTensor],
    views: Mapping[str, LearnedWeight],
    extras: Mapping[str, Tensor],
    loss: Loss,
    batches: int,
    schedule: Schedule,
    report: Report | None = None,
) -> Descent:
    """Walk down `loss` from `start`.

    start   what the loss is first measured with; tensors without a view keep their value
    views   learned views of some of them
    extras  any other parameters, tuned in float32 and returned in their own dtype
    Raises NumericsError if the loss of the start or of a step is not finite.
    """
    learned = _Learned(start, views, extras, "extras" in schedule.rates)
    chosen = spread(batches, schedule.validation)
    first = _measure(loss, learned.committed(), chosen, "the start")
    best, best_step, best_state = first, 0, (dict(start), dict(extras))
    kinds = learned.kinds(schedule.rates)
    if kinds and schedule.steps and batches:
        walker = _Walker(kinds, schedule)
        order = shuffled(batches, schedule.seed)
        marks = {round(schedule.steps * (i + 1) / schedule.checks) for i in range(schedule.checks)}
        for step in range(schedule.steps):
            value = learned.accumulate(loss, [next(order) for _ in range(schedule.batch_size)])
            if not math.isfinite(value):
                raise NumericsError(
                    f"tuning: the loss became {value} in step {step + 1}; lower the learning rates or leave tuning out"
                )
            walker.step(schedule.factor(step))
            for view in views.values():
                view.project_()
            if report is not None:
                report(step + 1, value)
            if step + 1 in marks:
                state = learned.committed()
                found = _measure(loss, state, chosen, f"step {step + 1}")
                if found < best:
                    best, best_step, best_state = found, step + 1, state
    return Descent(*best_state, first, best, best_step)


def spread(batches: int, count: int) -> list[int]:
    """`count` batch numbers evenly spread over all; all of them for 0 or where there are no more."""
    if count == 0 or count >= batches:
        return list(range(batches))
    return [(2 * i + 1) * batches // (2 * count) for i in range(count)]


def shuffled(batches: int, seed: int) -> Iterator[int]:
    """Batch numbers without end; every one is drawn once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()


class _Learned:
    """The state of a descent: views of weights, and extras as float32 leaves."""

    def __init__(
        self,
        start: Mapping[str, QTensor],
        views: Mapping[str, LearnedWeight],
        extras: Mapping[str, Tensor],
        tunes_extras: bool,
    ) -> None:
        self.start, self.views, self.given = start, views, extras
        self.fixed = {name: q.dequantize() for name, q in start.items() if name not in views}
        self.extras = {
            name: tensor.detach().to(torch.float32, copy=True).requires_grad_(tunes_extras)
            for name, tensor in extras.items()
        }

    def kinds(self, rates: Mapping[str, float]) -> list[tuple[Tensor, float]]:
        """Every parameter that has a rate, with its rate."""
        found = [(kind, tensor) for view in self.views.values() for kind, tensor in view.parameters().items()]
        found += [("extras", tensor) for tensor in self.extras.values()]
        return [(tensor, rates[kind]) for kind, tensor in found if rates.get(kind, 0) > 0]

    def accumulate(self, loss: Loss, indices: Sequence[int]) -> float:
        """Leaves the gradients of the mean loss over `indices` in the parameters; returns that mean."""
        dense = {name: view.weight() for name, view in self.views.items()}
        leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in dense.items()}
        total = 0.0
        for index in indices:
            value = loss({**self.fixed, **leaves}, self.extras, index) / len(indices)
            torch.autograd.backward([value])
            total += float(value.detach())
        reached = [name for name in dense if leaves[name].grad is not None and dense[name].requires_grad]
        if reached:
            torch.autograd.backward([dense[name] for name in reached], [leaves[name].grad for name in reached])
        return total

    def committed(self) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
        """The state as it would be written."""
        qtensors = {name: self.views[name].commit() if name in self.views else q for name, q in self.start.items()}
        extras = {name: tensor.detach().to(self.given[name].dtype, copy=True) for name, tensor in self.extras.items()}
        return qtensors, extras


class _Walker:
    """The two optimizers; both leave the gradients cleared."""

    def __init__(self, parameters: Sequence[tuple[Tensor, float]], schedule: Schedule) -> None:
        self.parameters = parameters
        self.adam: torch.optim.Adam | None = None
        if schedule.optimizer == "adam":
            groups = [{"params": [tensor], "lr": rate} for tensor, rate in parameters]
            self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        if self.adam is not None:
            for group, (_, rate) in zip(self.adam.param_groups, self.parameters, strict=True):
                group["lr"] = rate * factor
            self.adam.step()
        else:
            for tensor, rate in self.parameters:
                if tensor.grad is not None:
                    tensor.sub_(torch.sign(tensor.grad), alpha=rate * factor)
        for tensor, _ in self.parameters:
            tensor.grad = None


@torch.no_grad()
def _measure(
    loss: Loss, state: tuple[Mapping[str, QTensor], Mapping[str, Tensor]], chosen: Sequence[int], what: str
) -> float:
    """Mean loss over the batches `chosen`, of a state as it would be written."""
    dense = {name: q.dequantize() for name, q in state[0].items()}
    extras = {name: tensor.to(torch.float32) for name, tensor in state[1].items()}
    total = math.fsum(float(loss(dense, extras, index)) for index in chosen) / max(1, len(chosen))
    if not math.isfinite(total):
        raise NumericsError(f"tuning: the loss of {what} is {total}; the model or the calibration text is damaged")
    return total
