"""LearnedInput: static activation scales while a model is trained. Observed over the first batches, then learned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, per_tensor
from bitgrain.numerics.formats import FloatFormat
from bitgrain.numerics.observers import State, StaticInput, static_input, update
from bitgrain.numerics.quantize import replaced
from bitgrain.numerics.ranges import MovingAverage
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.training.latent import slowed


class LearnedInput(InputQuantizer):
    """x -> the same rounded under one static scale, which follows the data and then the gradient.

    For the first `batches` batches in training mode the limits are moving averages of each batch's (arXiv 1712.05877,
    section 3.1). From then on the scale is learned (LSQ, arXiv 1902.08153, equation 3, its gradient times
    1 / sqrt(N high) for N elements of one input), or, with `learn` False, stays. Zero points stay as observed.

    scale  float32 [1, 1], a parameter; zero: the stored zero point; limits: float64 [2]; seen: batches observed
    Raises SchemeError in evaluation before a batch was seen, and for a spec that is not static.
    """

    limits: Tensor
    seen: Tensor
    zero: Tensor | None

    def __init__(self, spec: QuantSpec, batches: int = 50, learn: bool = True) -> None:
        if spec.dynamic:
            raise SchemeError(f"inputs {spec.describe()} choose their scales at run time: there is nothing to learn")
        if spec.granularity != per_tensor():
            raise SchemeError(f"inputs {spec.describe()}: one static scale is learned, per_tensor")
        super().__init__(spec, static=StaticInput(torch.ones(1, 1)))
        self.batches = batches
        self.scale = nn.Parameter(torch.ones(1, 1), requires_grad=learn)
        zero = None if spec.symmetric else torch.zeros(1, 1, dtype=spec.format.code_dtype)
        self.register_buffer("zero", zero)
        self.register_buffer("limits", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        observing = self.training and int(self.seen) < self.batches
        if observing:
            self._observe(x)
        if not int(self.seen):
            raise SchemeError("static inputs have no scale yet: run a batch in training mode first (model.train())")
        scale = self.scale.detach() if observing else self.scale
        scale = slowed(scale, 1 / math.sqrt(x.shape[-1] * max(1.0, self.spec.high))).abs()
        scale = replaced(scale, scale.detach().to(self.freeze().scale.dtype).to(torch.float32))
        return fake_quantize(x, self.all_codes, scale=scale, zero=self.zero)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        old = State(MovingAverage(), *self.limits.tolist(), elements=int(self.seen))
        new = update(old, x)
        self.limits.copy_(torch.tensor([new.low, new.high], dtype=torch.float64))
        self.seen += 1
        found = static_input(replace(new, elements=1), self.spec)
        self.scale.copy_(found.scale.to(torch.float32))
        if self.zero is not None:
            self.zero.copy_(cast(Tensor, found.zero))

    def freeze(self) -> StaticInput:
        """The scale as it is stored."""
        assert isinstance(self.spec.scale, FloatFormat)
        stored = self.scale.detach().abs().to(self.spec.scale.torch_dtype)
        return StaticInput(stored, None if self.zero is None else self.zero.clone())
