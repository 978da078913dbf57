"""Layers that read the same inputs (q, k and v; gate and up), in one call of a kernel: inputs are quantized once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.kernels.int_linear import IntLinear, IntLinears
from bitgrain.runtime.packed_kernels import IntKernel
from bitgrain.runtime.quant_linear import QuantLinear


class FusedQuantLinears:
    """x -> the outputs of `layers` in their order, as each would give by itself (bit for bit).

    It holds the layers' kernels as they are now: make another after a layer was cast, loaded or replaced. Hooks of the
    layers (rotations, LoRA) do not run: `why_not` refuses those. Raises SchemeError for layers that `why_not` refuses.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        reason = why_not(layers)
        if reason is not None:
            raise SchemeError(f"these layers cannot run in one call: {reason}")
        self.out_features = tuple(layer.out_features for layer in layers)
        self._run = IntLinears([_integer(layer) for layer in layers])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._run(x)


def why_not(layers: Sequence[object]) -> str | None:
    """Why these layers cannot run in one call, or None."""
    if not 1 <= len(layers) <= 8:
        return f"{len(layers)} layers"
    first = None
    for layer in layers:
        if type(layer) is not QuantLinear or not isinstance(layer.kernel, IntKernel):
            return f"a {type(layer).__name__} that no integer kernel runs"
        if not isinstance(layer.kernel.linear, IntLinear) or layer.kernel.call is not layer.kernel.linear:
            return "columns or channels are multiplied apart, or the reference runs"
        if layer._forward_pre_hooks or layer._forward_hooks:  # pyright: ignore[reportPrivateUsage]
            return "a layer has hooks (rotated inputs)"
        linear = layer.kernel.linear
        kind = (linear.bits, linear.lengths, linear.inputs)
        if first is not None and kind != first:
            return "bits, groups or inputs differ"
        first = kind
    return None


def _integer(layer: QuantLinear) -> IntLinear:
    assert isinstance(layer.kernel, IntKernel)
    assert isinstance(layer.kernel.linear, IntLinear)
    return layer.kernel.linear
