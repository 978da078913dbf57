"""Kernels that hold a packed weight: what a `QuantLinear` runs, and the rows of the operator table that make them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.kernels.int_linear import IntLinear
from bitgrain.kernels.reference.int_linear import IntLinearTwin
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.columns import Columns
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.kernel_arguments import divide, integer_inputs, integer_weight, stored_weight


class PackedKernel(ABC):
    """A weight [out, in] in the layout of a kernel, with how its inputs are quantized.

    spec   of the weight
    shape  (out, in)
    call   x [.., in] -> x W^T + bias
    """

    spec: QuantSpec
    shape: tuple[int, int]
    call: Callable[[Tensor], Tensor]

    @abstractmethod
    def set_bias(self, bias: Tensor | None) -> None:
        """Take over the values of a bias [out], and wherever the memory of `tensors` lies now."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, all as bytes."""

    @abstractmethod
    def qtensor(self) -> QTensor:
        """The weight as it was given, unpacked."""

    @abstractmethod
    def repacked(self, q: QTensor) -> PackedKernel:
        """The same for another weight of the same spec and shape."""

    @abstractmethod
    def describe(self) -> str:
        """For the printed model."""


class IntKernel(PackedKernel):
    """Integer weights and inputs (`kernels.int_linear`).

    Beside the integer products, in the dtype of the inputs: columns that the weight keeps in 16 bits, and channels of
    the inputs that reach a threshold (LLM.int8(), arXiv 2208.07339), with those columns of the weight dequantized.
    """

    linear_type: type[IntLinear] | type[IntLinearTwin] = IntLinear

    def __init__(self, q: QTensor, quantizer: InputQuantizer) -> None:
        """q and the spec of `quantizer`: what `refuse_weight` and `refuse_inputs` have no word against."""
        assert len(q.shape) == 2
        self.spec, self.shape, self.quantizer = q.spec, (q.shape[0], q.shape[1]), quantizer
        lengths, self._groups = divide(q.spec, self.shape, quantizer)
        inputs = integer_inputs(quantizer, lengths)
        w = integer_weight(q, lengths, self._groups)
        self.linear = self.linear_type.pack(w.codes, w.scale, w.bits, inputs, lengths=w.lengths, zero=w.zero)
        # what the panels cannot give back as it was stored
        plain = isinstance(q.scale, Tensor)
        self._scale = None if plain else q.scale
        self._zero = q.zero if q.spec.zero_point == "real" else None
        self._columns = q.columns
        self._beside = None if q.columns is None else q.columns.index.to(torch.int64)
        self._settle()

    def _settle(self) -> None:
        if self._columns is not None:
            self.call = self._with_columns
        elif self.quantizer.spec.threshold:
            self.call = self._with_threshold
        else:
            self.call = self.linear

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "call"}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._settle()

    def _with_columns(self, x: Tensor) -> Tensor:
        assert self._columns is not None
        assert self._beside is not None
        y = self.linear(x.index_fill(-1, self._beside, 0.0))
        return y.add_(F.linear(x.index_select(-1, self._beside), self._columns.values.to(x.dtype)))

    def _with_threshold(self, x: Tensor) -> Tensor:
        apart = (x.abs() >= self.quantizer.spec.threshold).view(-1, x.shape[-1]).any(0)
        index = apart.nonzero().view(-1)
        if not len(index):
            return self.linear(x)
        columns = self.linear.dequantize_features(index).to(x.dtype)
        return self.linear(x.index_fill(-1, index, 0.0)).add_(x.index_select(-1, index) @ columns)

    def set_bias(self, bias: Tensor | None) -> None:
        self.linear.set_bias(bias)

    def tensors(self) -> Mapping[str, Tensor]:
        found = {"panels": self.linear.panels}
        if self._columns is not None:
            found["column_values"] = self._columns.values.view(torch.uint8)
        return found

    def qtensor(self) -> QTensor:
        codes, scale, zero = stored_weight(self.spec, self.shape, self.linear.unpack(), self._groups)
        columns = None if self._columns is None else Columns(self._columns.index, self._columns.values)
        zero = zero if self._zero is None else self._zero
        return QTensor(codes, scale if self._scale is None else self._scale, zero, self.spec, None, columns)

    def repacked(self, q: QTensor) -> PackedKernel:
        return type(self)(q, self.quantizer)

    def describe(self) -> str:
        return f"{self.spec.describe()}, inputs {self.quantizer.spec.describe()}"


class IntTwin(IntKernel):
    """The same by the readable twin."""

    linear_type = IntLinearTwin
