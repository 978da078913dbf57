"""Quantization-aware training of a whole model's quantized weights: latent weights, scales and a few other parameters.

The caller's loss sees dense weights; their gradients are handed on to what is learned matrix by matrix, so that the
graph of one matrix is held at a time. States are measured on windows that are held back, as they will be written, and
the best one is what counts; the start is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, TrainingError
from bitgrain.numerics import QTensor
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.training.adam import Adam
from bitgrain.training.latent import FakeQuantizedWeight, latent_weight
from bitgrain.training.settings import TrainingSettings
from bitgrain.tuning.learned import scale_unit

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Sequence[int]], Tensor]
"""(dense weights, extra parameters, windows) -> their mean loss, a scalar."""


class Keeper(Protocol):
    """Where a training keeps what it needs to go on after a kill."""

    def best(self, qtensors: Mapping[str, QTensor], extras: Mapping[str, Tensor]) -> None:
        """A state that is better than all before it."""
        ...

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], last: bool) -> None:
        """Everything after a step; `last`: no more steps follow. May be passed over if not `last`."""
        ...

    def load(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """What was saved last; None at the start."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    first_loss  of the start, mean over the windows held back; best_loss: of the best state, at most first_loss
    best_step   after how many steps it was reached; 0 is the start itself
    """

    first_loss: float
    best_loss: float
    best_step: int


class _Part:
    """One matrix: its latent weight in steps of the grid, as tiles [down, across, elements], and its quantizer.

    In steps, codes stay when their scale changes: the scale's gradient is then the exact one, sum g (v - z), and both
    can move at once.
    """

    def __init__(self, start: QTensor, weight: Tensor | None, settings: TrainingSettings) -> None:
        self.view = FakeQuantizedWeight(start)
        steps = self.view.first.unsqueeze(-1)
        latent = to_tiles(latent_weight(start, weight), start.spec.granularity)
        self.latent = latent / steps.masked_fill(steps == 0, 1.0)
        self.learned: dict[str, tuple[Tensor, Tensor]] = {}
        if settings.rate:
            self.learned["latent"] = self.latent.requires_grad_(True), torch.tensor(settings.rate)
        if self.view.scale is not None and settings.scale_rate:
            self.learned["scale"] = self.view.scale, settings.scale_rate * scale_unit(start) * self.view.first.abs()
        if self.view.zero is not None and settings.zero_rate:
            self.learned["zero"] = self.view.zero, torch.tensor(settings.zero_rate)

    def weight(self) -> Tensor:
        """The latent weight itself, float32 [out, in]."""
        tiles = self.latent * self.view.steps().unsqueeze(-1)
        return from_tiles(tiles, self.view.spec.granularity, self.view.shape)

    def dense(self) -> Tensor:
        """What the model computes with, float32 [out, in], differentiable."""
        return self.view(self.weight())

    @torch.no_grad()
    def project_(self) -> None:
        """Bring latent weights beyond the grid to its end: they would get no gradient any more, and never come back
        (BinaryConnect, arXiv 1511.00363, section 2.4)."""
        zero = self.view.zeros()
        low, high = self.view.spec.low, self.view.spec.high
        if zero is None:
            self.latent.clamp_(low, high)
        else:
            offset = zero.to(torch.float32).unsqueeze(-1)
            self.latent.clamp_(low - offset, high - offset)


class Training:
    """A descent that can be stopped and taken up again between any two steps.

    start     all quantized weights by name; those with sparse outliers are not trained
    weights   what was rounded, by the same names, where it is known: see `latent_weight`
    extras    other parameters by name that may be trained: gains of norms
    loss      see `Loss`; windows: how many there are, of which `held_back` are not trained on
    """

    def __init__(
        self,
        start: Mapping[str, QTensor],
        weights: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        loss: Loss,
        windows: int,
        settings: TrainingSettings,
    ) -> None:
        self.start, self.loss, self.settings = start, loss, settings
        self.parts = {n: _Part(q, weights.get(n), settings) for n, q in start.items() if q.outliers is None}
        self.fixed = {name: q.dequantize() for name, q in start.items() if q.outliers is not None}
        self.given = extras
        self.extras = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in extras.items()}
        learned = {f"{kind}.{n}": pair for n, part in self.parts.items() for kind, pair in part.learned.items()}
        if settings.extra_rate:
            elements = sum(q.codes.numel() for q in start.values())
            unit = sum(q.codes.numel() * scale_unit(q) for q in start.values()) / max(1, elements)
            for name, tensor in self.extras.items():
                learned[f"extra.{name}"] = tensor.requires_grad_(True), torch.tensor(settings.extra_rate * unit)
        self.adam = Adam(learned)
        self.outcome: Outcome | None = None
        """What came of it so far; None before the start was measured."""
        self.held_back = held_back(windows, settings)
        self.order = [i for i in range(windows) if i not in self.held_back] or list(range(windows))

    def run(self, keeper: Keeper, report: Callable[[int, float], None]) -> Outcome:
        """All steps that are left; `report(steps done, loss of the last one)`.

        Raises TrainingError where a loss or a gradient is not finite, NumericsError where that of the start is not;
        the states that `keeper` was given stay.
        """
        steps, checks = self.settings.steps, self.settings.checks
        marks = {round(steps * (i + 1) / checks) for i in range(checks)}
        self.outcome = outcome = self._resume(keeper)
        for step in range(self.adam.steps, steps):
            value = self._accumulate(self._windows(step))
            if not math.isfinite(value) or not self._finite():
                raise TrainingError(f"training: the loss became {value} or its gradient infinite in step {step + 1}")
            self.adam.step(self.settings.factor(step))
            for part in self.parts.values():
                part.project_()
            report(step + 1, value)
            if step + 1 in marks:
                self.outcome = outcome = self._check(outcome, step + 1, keeper)
            self._save(keeper, outcome, step + 1 == steps)
        return outcome

    def committed(self) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
        """The state as it would be written."""
        found = {
            n: self.parts[n].view.commit(self.parts[n].weight()) if n in self.parts else q
            for n, q in self.start.items()
        }
        extras = {name: tensor.detach().to(self.given[name].dtype, copy=True) for name, tensor in self.extras.items()}
        return found, extras

    def _windows(self, step: int) -> list[int]:
        """The windows of a step: every one is drawn once before any is drawn again, in orders that the seed gives."""
        batch, count = self.settings.batch, len(self.order)
        found: list[int] = []
        for place in range(step * batch, (step + 1) * batch):
            generator = torch.Generator().manual_seed(self.settings.seed + place // count)
            found.append(self.order[int(torch.randperm(count, generator=generator)[place % count])])
        return found

    def _accumulate(self, windows: Sequence[int]) -> float:
        """Leaves the gradients of the mean loss over `windows` in the parameters; returns that mean."""
        with torch.no_grad():
            leaves = {name: part.dense() for name, part in self.parts.items()}
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        total, size = 0.0, self.settings.at_once
        for piece in (windows[i : i + size] for i in range(0, len(windows), size)):
            value = self.loss({**self.fixed, **leaves}, self.extras, piece) * (len(piece) / len(windows))
            torch.autograd.backward([value])
            total += float(value.detach())
        for name, part in self.parts.items():
            gradient = leaves.pop(name).grad
            if gradient is not None and part.learned:
                torch.autograd.backward([part.dense()], [gradient])
        return total

    def _finite(self) -> bool:
        gradients = [tensor.grad for tensor in self.adam.parameters.values() if tensor.grad is not None]
        return bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()) if gradients else True

    def _check(self, outcome: Outcome, step: int, keeper: Keeper) -> Outcome:
        state = self.committed()
        found = self._measure(state)
        if not found < outcome.best_loss:
            return outcome
        keeper.best(*state)
        return Outcome(outcome.first_loss, found, step)

    @torch.no_grad()
    def _measure(self, state: tuple[Mapping[str, QTensor], Mapping[str, Tensor]]) -> float:
        dense = {name: q.dequantize() for name, q in state[0].items()}
        extras = {name: tensor.to(torch.float32) for name, tensor in state[1].items()}
        windows = self.held_back or self.order[: self.settings.validation]
        return math.fsum(float(self.loss(dense, extras, [i])) for i in windows) / max(1, len(windows))

    def _resume(self, keeper: Keeper) -> Outcome:
        kept = keeper.load()
        if kept is None:
            first = self._measure((self.start, self.given))
            if not math.isfinite(first):
                raise NumericsError(f"training: the loss of the start is {first}; the model or the text is damaged")
            return Outcome(first, first, 0)
        tensors, record = kept
        with torch.no_grad():
            for name, tensor in self.adam.parameters.items():
                tensor.copy_(tensors[f"value.{name}"])
        self.adam.restore(tensors, record["step"])
        return Outcome(record["first_loss"], record["best_loss"], record["best_step"])

    def _save(self, keeper: Keeper, outcome: Outcome, last: bool) -> None:
        values = {f"value.{name}": tensor.detach() for name, tensor in self.adam.parameters.items()}
        record = {"step": self.adam.steps, **vars(outcome)}
        keeper.save({**values, **self.adam.state()}, record, last)


def held_back(windows: int, settings: TrainingSettings) -> list[int]:
    """The windows that are not trained on: evenly spread, at most a tenth of all."""
    count = min(settings.validation, windows // 10)
    return [(2 * i + 1) * windows // (2 * count) for i in range(count)]
