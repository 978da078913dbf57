"""FP8 training, simulated: weights and activations are rounded to E4M3, gradients to E5M2, each with one scale.

The three products of a linear layer see rounded numbers only, as on hardware with FP8 units; weights, optimizer and
everything between the layers stay as they are (Micikevicius et al., arXiv 2209.05433, sections 3 and 4). A scale is the
largest magnitude of the tensor itself ("current"), or of its last few ones ("delayed", which costs no second pass over
the data on hardware; what has grown beyond it saturates).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, per_tensor
from bitgrain.numerics.formats import FP8_E4M3, FP8_E5M2

FORWARD = QuantSpec(FP8_E4M3, per_tensor(), dynamic=True)
BACKWARD = QuantSpec(FP8_E5M2, per_tensor(), dynamic=True)
_KINDS = ("input", "weight", "gradient")


class Fp8Linear(nn.Linear):
    """nn.Linear whose products are those of FP8. Shares the parameters of the layer that it replaces.

    history  how many of the last largest magnitudes give the scales; 0: current scaling
    """

    def __init__(self, linear: nn.Linear, history: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.history = history
        for kind in _KINDS:
            seen = torch.zeros(history, device=linear.weight.device)
            self.register_buffer(f"{kind}_history", seen, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Fp8Product.apply(input, self.weight, self.bias, self, torch.is_grad_enabled()))

    def round(self, x: Tensor, kind: str, learning: bool = True) -> Tensor:
        """`x` on the grid for "input", "weight" or "gradient", in its own dtype; `learning`: the history sees it."""
        spec = BACKWARD if kind == "gradient" else FORWARD
        if self.history == 0:
            return fake_quantize(x, spec)
        seen: Tensor = getattr(self, f"{kind}_history")
        now = x.abs().amax().to(seen.dtype)
        largest = seen.amax()
        scale = torch.where(largest > 0, largest, now) / spec.high
        if learning:
            seen.copy_(torch.cat([now.reshape(1), seen[:-1]]))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return fake_quantize(x, replace(spec, dynamic=False), scale=scale.reshape(1, 1))

    def extra_repr(self) -> str:
        scaling = "current scaling" if self.history == 0 else f"scaling delayed over {self.history} steps"
        return f"{super().extra_repr()}, fp8, {scaling}"


class _Fp8Product(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x, with x and W in E4M3 and dy in E5M2; nothing is masked where it saturates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Fp8Linear, learning: bool) -> Tensor:
        x, weight = layer.round(x, "input", learning), layer.round(weight, "weight", learning)
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        exact = grad_outputs[0]
        grad = ctx.layer.round(exact, "gradient")
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = exact.reshape(-1, exact.shape[-1]).sum(0)
        return dx, dweight, dbias, None, None


def fp8_training_(module: nn.Module, *, history: int = 0, keep: Sequence[str] = ("*lm_head",)) -> list[str]:
    """Let the linear layers inside `module` multiply in FP8 from now on, in place; returns their paths.

    history  0: scales from the tensor itself; n: from the largest magnitude of the last n steps (16 is usual)
    keep     paths (with wildcards) of layers to leave; the head is, as usual
    Parameters, their names and the optimizer stay the same. Raises SchemeError where nothing is left to be replaced.
    """
    if history < 0:
        raise SchemeError(f"a history of scales is not negative: {history}")
    found = [
        path
        for path, part in module.named_modules()
        if path and type(part) is nn.Linear and not any(fnmatch.fnmatchcase(path, pattern) for pattern in keep)
    ]
    if not found:
        raise SchemeError("FP8 training needs an nn.Linear inside the module, and none is there to be replaced")
    for path in found:
        owner, _, leaf = path.rpartition(".")
        old = cast(nn.Linear, module.get_submodule(path))
        setattr(module.get_submodule(owner), leaf, Fp8Linear(old, history).train(old.training))
    return found
