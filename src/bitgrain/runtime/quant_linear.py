"""A linear layer that multiplies its packed weight by a kernel: no dense weight at any moment. Inference only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.kernel_holder import LAYERS, KernelHolder
from bitgrain.runtime.packed_kernels import PackedKernel
from bitgrain.runtime.packed_layer import PackedLayer


class QuantLinear(KernelHolder[PackedKernel], PackedLayer):
    """x [.., in] float32, bfloat16 or float16 on the CPU -> x W^T + b in the dtype of x; W [out, in] is packed.

    kernel  the weight and how inputs are quantized (`runtime.packed_kernels`)
    bias    [out] or None; its values are taken over when the layer is made, cast or loaded
    dtype, stored, transposed   as of `PackedLayer`
    tied    as of `KernelHolder`: the head of a model whose embedding looks its rows up in the same kernel
    Raises SchemeError where a gradient is asked for, or another device.
    """

    def __init__(
        self,
        kernel: PackedKernel,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        transposed: bool = False,
        tied: bool = False,
    ) -> None:
        PackedLayer.__init__(self, kernel.shape, kernel.spec, bias, dtype, stored, transposed)
        self.tied = tied
        self.hold(kernel)

    def hold(self, kernel: PackedKernel) -> None:
        kernel.set_bias(self.bias)
        super().hold(kernel)
        self._call = kernel.call

    def _refill(self, weight: PackedMatrix) -> None:
        self.hold(self.kernel.repacked(weight))

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, quant_linear(input, self._key, self.out_features))
        if input.requires_grad and torch.is_grad_enabled():
            raise SchemeError(
                "packed kernels compute no gradients: run under torch.no_grad(), or load what is to be trained with "
                "bitgrain.load(..., low_bit=True)"
            )
        return self._call(input)

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        return self.kernel.qtensor()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_call"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kernel.describe()}"


@torch.library.custom_op("bitgrain::quant_linear", mutates_args=())
def quant_linear(x: Tensor, key: int, out_features: int) -> Tensor:
    """The layer of this number in a compiled graph."""
    with torch.no_grad():
        return cast(QuantLinear, LAYERS[key]).kernel.call(x)


@quant_linear.register_fake
def _(x: Tensor, key: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def quant_layers(module: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The layers that run packed weights, by path."""
    for path, part in module.named_modules():
        if isinstance(part, QuantLinear):
            yield path, part
