"""A linear layer that multiplies its packed weight by a kernel: no dense weight at any moment.

Inference only. The packed panels are the only copy of the codes; what a state_dict holds (`numerics.packed`, as
`LowBitLinear` has it) is made from them on the fly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor
from bitgrain.numerics.packed import pack_qtensor, packed_matrix, packed_specs
from bitgrain.runtime.packed_kernels import PackedKernel
from bitgrain.runtime.packed_layer import PackedLayer

_PREFIX = "packed_"
_KEYS = itertools.count()


class QuantLinear(PackedLayer):
    """x [.., in] float32, bfloat16 or float16 on the CPU -> x W^T + b in the dtype of x; W [out, in] is packed.

    kernel  the weight and how inputs are quantized (`runtime.packed_kernels`)
    bias    [out] or None; its values are taken over when the layer is made, cast or loaded
    dtype, stored, transposed   as of `PackedLayer`
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
    ) -> None:
        super().__init__(kernel.shape, kernel.spec, bias, dtype, stored, transposed)
        self._take(kernel)

    def _take(self, kernel: PackedKernel) -> None:
        """Run `kernel` from now on, with the bias as it is now."""
        self.kernel = kernel
        kernel.set_bias(self.bias)
        for name, tensor in kernel.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self._call = kernel.call
        self._key = next(_KEYS)
        _LAYERS[self._key] = self

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

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return sum(tensor.nbytes for tensor in self.kernel.tensors().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        if (place := fn(self.like).device).type != "cpu":
            raise SchemeError(
                f"packed weights run on the CPU, not on {place}: load the model with execution='dequantize' for other "
                "devices"
            )
        super()._apply(fn, recurse)  # panels are bytes, which no cast touches
        self._take(self.kernel)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # pyright: ignore[reportUnknownMemberType]
        for name, tensor in pack_qtensor(self.qtensor()).items():
            destination[f"{prefix}{_PREFIX}{name}"] = tensor.view(torch.uint8)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        start = prefix + _PREFIX
        given = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(  # pyright: ignore[reportUnknownMemberType]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        parts: dict[str, Tensor] = {}
        for name, dtype, shape in packed_specs(self.spec, self.kernel.shape):
            size = (*shape[:-1], shape[-1] * dtype.itemsize)
            tensor = given.pop(name, None)
            if tensor is None:
                missing_keys.append(start + name)
            elif tuple(tensor.shape) != size or tensor.dtype != torch.uint8:
                error_msgs.append(f"{start}{name}: {tuple(tensor.shape)} {tensor.dtype}, the layer has {size} bytes")
            else:
                parts[name] = tensor.detach().cpu().clone().view(dtype)
        unexpected_keys += [start + name for name in given] if strict else []
        if len(parts) == len(packed_specs(self.spec, self.kernel.shape)):
            self._take(self.kernel.repacked(packed_matrix(parts, self.spec, self.kernel.shape)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_call", "_key")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take(self.kernel)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kernel.describe()}"


_LAYERS: WeakValueDictionary[int, QuantLinear] = WeakValueDictionary()
"""Layers by number, by which a compiled graph calls them: it holds no objects."""


@torch.library.custom_op("bitgrain::quant_linear", mutates_args=())
def quant_linear(x: Tensor, key: int, out_features: int) -> Tensor:
    """The layer of this number in a compiled graph."""
    with torch.no_grad():
        return _LAYERS[key].kernel.call(x)


@quant_linear.register_fake
def _(x: Tensor, key: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def quant_layers(module: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The layers that run packed weights, by path."""
    for path, part in module.named_modules():
        if isinstance(part, QuantLinear):
            yield path, part
