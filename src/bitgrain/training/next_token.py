"""The plain training loop of language models: next-token loss on windows of text, AdamW, a rate that rises and falls.

Which windows a step sees depends on the seed and its number alone, and dropout is off: a loop that goes on from a saved
state ends in the same bits. A state is saved only when its loss and gradients were found to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.sums import row_sums
from bitgrain.training.adamw8bit import AdamW8bit
from bitgrain.training.distillation import cross_entropy

OptimizerName = Literal["adamw", "adamw8bit"]
Each = Callable[[Callable[[Tensor], Any], Sequence[Tensor]], Iterable[Any]]


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The rate is QLoRA's for models of up to 13 B parameters (arXiv 2305.14314, table 9).

    steps         gradient steps
    batch         windows in a step
    rate          the largest; rises over `warmup` (a share of the steps), then falls linearly to 0
    optimizer     "adamw" or "adamw8bit"
    weight_decay  as AdamW's
    clip          largest norm of all gradients together; 0: none
    seed          of the order of the windows
    save_every    steps between saved states
    """

    steps: int = 200
    batch: int = 4
    rate: float = 2e-4
    warmup: float = 0.03
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 10

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise SchemeError(f"training knows the optimizers {', '.join(get_args(OptimizerName))}, not {self}")
        if self.steps < 1 or self.batch < 1 or self.save_every < 1 or self.clip < 0 or self.weight_decay < 0:
            raise SchemeError(f"training needs at least 1 step, batch and save_every, and no negative clip: {self}")
        if not (math.isfinite(self.rate) and self.rate > 0 and 0 <= self.warmup <= 1):
            raise SchemeError(f"training needs a rate above 0 and a warm-up of 0 to 1 of the steps, not {self}")

    def rate_at(self, step: int) -> float:
        """Of the step with this number, from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * (self.steps - step) / max(1, self.steps - rising)

    def windows_of(self, step: int, count: int) -> list[int]:
        """Which of `count` windows the step sees: every one is seen once before any is seen again."""
        found: list[int] = []
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, index = divmod(place, count)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            found.append(int(torch.randperm(count, generator=generator)[index]))
        return found


@dataclass(frozen=True)
class TrainState:
    """A loop between two steps.

    step     how many are done
    tensors  the trained parameters by name, and behind a "|" the optimizer's states of each
    losses   of the steps done
    """

    step: int
    tensors: Mapping[str, Tensor]
    losses: tuple[float, ...]


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token but the first, given those before it; `ids` int64 [windows, tokens]."""
    return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)


def train_next_token(
    model: nn.Module,
    windows: Tensor,
    settings: TrainSettings,
    *,
    each: Each | None = None,
    start: TrainState | None = None,
    save: Callable[[TrainState], None] | None = None,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the parameters of `model` that want gradients, in place; returns the loss of every step.

    windows  int64 [windows, tokens]; batches go to the device of the parameters
    each     maps a function over the windows of a batch, in order: they are then run one by one (or in threads), and
             their gradients added up in that order; None: the batch is run as one
    start    a state that `save` was given: go on from there
    save     called every `save_every` steps; the state's tensors change with the next step, so write them at once
    report   called with (steps done, loss of the last step)
    Raises SchemeError where nothing can be trained or `start` is of other parameters, NumericsError when a loss or a
    gradient is not finite: the parameters are then as before that step, and the last saved state is good.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise SchemeError("no parameter of the model wants a gradient: attach adapters, or set requires_grad")
    kinds: dict[str, type[Optimizer]] = {"adamw": AdamW, "adamw8bit": AdamW8bit}
    settings_of: dict[str, Any] = {"lr": settings.rate, "weight_decay": settings.weight_decay}
    optimizer = kinds[settings.optimizer](trained.values(), **settings_of)
    step, losses = 0, list[float]()
    if start is not None:
        _restore(start, trained, optimizer)
        step, losses = start.step, list(start.losses)
    device = next(iter(trained.values())).device
    model.eval()  # no dropout: the loss is that of the model as it will be used
    while step < settings.steps:
        batch = windows[settings.windows_of(step, len(windows))].to(device)
        value = _gradients(model, list(trained.values()), batch, each)
        norm = gradient_norm(trained.values())
        if not (math.isfinite(value) and math.isfinite(norm)):
            what = f"the loss is {value}" if not math.isfinite(value) else f"the norm of the gradients is {norm}"
            raise NumericsError(f"training stopped in step {step + 1}: {what}; lower the rate ({settings.rate:g})")
        if save is not None and step and step % settings.save_every == 0:
            save(_state(step, trained, optimizer, losses))
        if settings.clip and norm > settings.clip:
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(settings.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        optimizer.step()
        step += 1
        losses.append(value)
        if report is not None:
            report(step, value)
    return losses


def _gradients(model: nn.Module, parameters: Sequence[nn.Parameter], batch: Tensor, each: Each | None) -> float:
    """Leaves the gradients of the batch's mean loss in the parameters, and returns that."""

    def one(windows: Tensor) -> tuple[float, Sequence[Tensor | None]]:
        loss = next_token_loss(model, windows)
        return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

    for parameter in parameters:
        parameter.grad = None
    parts = batch.split(len(batch) if each is None else 1)
    losses: list[float] = []
    for loss, gradients in map(one, parts) if each is None else each(one, parts):
        losses.append(loss)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                share = gradient / len(parts)
                parameter.grad = share if parameter.grad is None else parameter.grad + share
    return sum(losses) / len(losses)


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients together; in float64, in an order that no number of threads changes."""
    squares = [float(row_sums(p.grad.square().reshape(1, -1))) for p in parameters if p.grad is not None]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf


def _state(step: int, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, losses: list[float]) -> TrainState:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach().cpu()
        tensors |= {f"{name}|{key}": value.cpu() for key, value in optimizer.state[parameter].items()}
    return TrainState(step, tensors, tuple(losses))


@torch.no_grad()
def _restore(start: TrainState, trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    if {name for name in start.tensors if "|" not in name} != set(trained):
        raise SchemeError("the saved state is of other parameters than those that are trained now")
    states: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(trained.items()):
        parameter.copy_(start.tensors[name])
        prefix = f"{name}|"
        states[index] = {
            key.removeprefix(prefix): value for key, value in start.tensors.items() if key.startswith(prefix)
        }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
