"""A dense linear layer that multiplies few rows natively: the head of a model whose other layers are packed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bitgrain.kernels.dense_rows import MOST_ROWS, dense_rows
from bitgrain.kernels.memory import use_large_pages
from bitgrain.kernels.native import DTYPES
from bitgrain.runtime.owned import OwnedBy


class FewRows(OwnedBy):
    """The forward of an nn.Linear; gradients, other devices and many rows go its own way."""

    def __call__(self, input: Tensor) -> Tensor:
        layer = cast(nn.Linear, self.owner)
        weight = layer.weight
        if (
            input.numel() <= MOST_ROWS * input.shape[-1]
            and input.dtype in DTYPES
            and type(weight) is nn.Parameter
            and weight.dtype == input.dtype
            and weight.device.type == input.device.type == "cpu"
            and weight.stride(1) == 1
            and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
            and not torch.compiler.is_compiling()
        ):
            return dense_rows(input, weight, layer.bias)
        return type(layer).forward(layer, input)


def multiply_few_rows_natively(layer: nn.Module | None) -> None:
    """Let a plain nn.Linear do so; other layers stay as they are."""
    if type(layer) is nn.Linear and "forward" not in layer.__dict__:
        use_large_pages(layer.weight)
        cast(Any, layer).forward = FewRows(layer)
