"""A linear layer without a dense weight: what every kind of it shows to code that expects one (docs/decisions/0016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec


class PackedLayer(nn.Linear):
    """x [.., in] -> x W^T + b, where W [out, in] is a QTensor in some packed form.

    bias        [out] or None, as it is
    dtype       of the dense weight while it is there; follows `.to(dtype)` as a parameter would
    stored      the dtype that the weight had when it was quantized: the dense weight is rounded to it first, as a
                dequantized checkpoint is
    transposed  the layer replaces a Conv1D, which keeps its dense weight [in, out]
    """

    like: Tensor  # empty: has the dtype and device of the dense weight, through every `.to`

    def __init__(
        self,
        shape: tuple[int, ...],
        spec: QuantSpec,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        stored: torch.dtype | None,
        transposed: bool,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)  # Linear's own would make a dense weight
        self.out_features, self.in_features = shape
        self.spec, self.stored, self.transposed = spec, stored or dtype, transposed
        self.register_parameter("bias", bias)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The dense weight [out, in]; a new tensor at every call."""
        return self.qtensor().dequantize(self.stored).to(self.like.dtype)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`dequantize`, for code that looks at a weight; what would write to it gets a SchemeError."""
        return self.dequantize().as_subclass(_ReadOnly)


class _ReadOnly(Tensor):
    """A dense copy of a packed weight: assigning to its `data` would be lost, and is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == _SET_DATA:
            raise SchemeError(
                "this weight is kept in low bits and cannot be changed in place: merge adapters with a LoraConfig from "
                "bitgrain.training.lora.lora_config, or make the layer dense first (LowBitLinear.to_dense)"
            )
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return func(*args, **(kwargs or {}))


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
