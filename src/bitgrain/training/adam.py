"""Adam (arXiv 1412.6980) on named tensors, with a state that can be stored and taken up again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_EPSILON = 1e-12
"""Small: a weight's gradient of a mean over tokens is itself tiny."""


class Adam:
    """Moments of `parameters`, each with its rate, which broadcasts to it. Betas (0.9, 0.99): training is short."""

    def __init__(self, parameters: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.parameters = {name: tensor for name, (tensor, _) in parameters.items()}
        self.rates = {name: rate for name, (_, rate) in parameters.items()}
        self.steps = 0
        self.means = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        self.squares = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Move every parameter that has a gradient, by about `factor` times its rate; gradients are cleared."""
        self.steps += 1
        unbiased = 1 - 0.9**self.steps
        spread = 1 - 0.99**self.steps
        for name, tensor in self.parameters.items():
            gradient = tensor.grad
            if gradient is None:
                continue
            mean = self.means[name].lerp_(gradient, 0.1)
            square = self.squares[name].mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            change = mean / square.div(spread).sqrt_().add_(_EPSILON)
            tensor.sub_(change.mul_(self.rates[name]), alpha=factor / unbiased)
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments by name; `steps` is apart."""
        means = {f"mean.{name}": tensor for name, tensor in self.means.items()}
        return {**means, **{f"square.{name}": tensor for name, tensor in self.squares.items()}}

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """The inverse of `state`."""
        self.steps = steps
        for name in self.parameters:
            self.means[name].copy_(state[f"mean.{name}"])
            self.squares[name].copy_(state[f"square.{name}"])
