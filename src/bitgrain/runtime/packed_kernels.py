"""Kernels that hold a packed weight: what a `QuantLinear` runs, and what the rows of the operator table make."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.kernels.code_linear import CodeLinear
from bitgrain.kernels.int_linear import IntLinear
from bitgrain.kernels.reference.code_linear import CodeLinearTwin
from bitgrain.kernels.reference.int_linear import IntLinearTwin
from bitgrain.numerics import QTensor
from bitgrain.numerics.formats import Format
from bitgrain.numerics.outliers import Outliers, column_dtype
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.kernel_arguments import (
    Spans,
    code_scales,
    float_inputs,
    integer_inputs,
    integer_scales,
    packed_codes,
    plain_dtype,
    stored_tiles,
)

_CALLED = {"linear", "call", "_ungathered"}
"""What layers hold, or is made from it."""


class PackedKernel(ABC):
    """A weight [out, in] in the layout of a kernel, with how its inputs are quantized.

    Beside the kernel's product, in the dtype of the inputs: columns that the weight keeps in 16 bits, sparse outliers,
    and channels of the inputs that reach a threshold (LLM.int8(), arXiv 2208.07339), with those columns dequantized.
    Inputs of a weight with an order of its columns are gathered first.

    linear  the kernel
    call    x [.., in] -> x W^T + bias: `linear` itself where there is nothing beside
    """

    linear: IntLinear | IntLinearTwin | CodeLinear | CodeLinearTwin
    call: Callable[[Tensor], Tensor]

    def __init__(self, weight: PackedMatrix, quantizer: InputQuantizer | None) -> None:
        self.spec, self.shape, self.quantizer = weight.spec, weight.shape, quantizer
        # what panels cannot give back as it was stored
        self._scale: Tensor | QTensor | None = weight.scale
        self._zero, self._minimum = weight.zero, weight.minimum
        self._order = weight.order
        self._columns, self._sparse = weight.columns, None
        if weight.outliers is not None:
            self._sparse = _sparse(weight.outliers, weight.shape)

    @abstractmethod
    def unpacked(self) -> tuple[Tensor, Tensor | QTensor, Tensor | None, Tensor | QTensor | None]:
        """Unsigned codes, scales, zero points and minima (None where there are none), as a QTensor stores them."""

    def _stored_zeros(
        self, found: Tensor | None, groups: Sequence[int] | None = None
    ) -> tuple[Tensor | None, Tensor | QTensor | None]:
        """Zero points and minima as a QTensor has them: those that are kept, or what the panels gave back."""
        if self.spec.symmetric or found is None or self._zero is not None or self._minimum is not None:
            return self._zero, self._minimum
        tiles = stored_tiles(found, self.spec, self.shape, groups)
        if self.spec.minimum is not None:
            return None, tiles.to(plain_dtype(self.spec.minimum))
        return _signed(tiles, self.spec.format), None

    def _settle(self) -> None:
        """To be called once `linear` is there."""
        if self._columns is not None:
            self.call = self._with_columns
        elif self._sparse is not None:
            self.call = self._with_outliers
        elif self.quantizer is not None and self.quantizer.spec.threshold:
            self.call = self._with_threshold
        else:
            self.call = self.linear
        if self._order is not None:
            self._ungathered, self.call = self.call, self._with_order

    def _with_order(self, x: Tensor) -> Tensor:
        assert self._order is not None
        return self._ungathered(x.index_select(-1, self._order))

    def _with_columns(self, x: Tensor) -> Tensor:
        assert self._columns is not None
        index = self._columns.index.to(torch.int64)
        y = self.linear(x.index_fill(-1, index, 0.0))
        return y.add_(F.linear(x.index_select(-1, index), self._columns.values.to(x.dtype)))

    def _with_outliers(self, x: Tensor) -> Tensor:
        assert self._sparse is not None
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        return self.linear(x).add_((self._sparse @ rows.T).T.view(*x.shape[:-1], -1))

    def _with_threshold(self, x: Tensor) -> Tensor:
        assert self.quantizer is not None
        assert isinstance(self.linear, IntLinear | IntLinearTwin)
        apart = (x.abs() >= self.quantizer.spec.threshold).view(-1, x.shape[-1]).any(0)
        index = apart.nonzero().view(-1)
        if not len(index):
            return self.linear(x)
        columns = self.linear.dequantize_features(index).to(x.dtype)
        return self.linear(x.index_fill(-1, index, 0.0)).add_(x.index_select(-1, index) @ columns)

    def set_bias(self, bias: Tensor | None) -> None:
        """Take over the values of a bias [out], and wherever the memory of `tensors` lies now."""
        self.linear.set_bias(bias)

    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, as bytes; small tables apart."""
        found = {"panels": self.linear.panels}
        if self._columns is not None:
            found["column_values"] = self._columns.values.view(torch.uint8)
        if self._order is not None:
            found["order"] = self._order.view(torch.uint8)
        return found

    def qtensor(self) -> QTensor:
        """The weight as it was given, unpacked."""
        codes, scale, zero, minimum = self.unpacked()
        outliers = None if self._sparse is None else _outliers(self._sparse)
        more = (outliers, self._columns, minimum, self._order)
        return QTensor(_signed(codes, self.spec.format), scale, zero, self.spec, *more)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, for ids [...]: [..., in], what `QTensor.dequantize` gives, bit for bit. Only of weights
        that `refuse_shared` has no word against."""
        return self.linear.rows(ids, dtype)

    def repacked(self, weight: PackedMatrix) -> PackedKernel:
        """The same for another weight of the same spec and shape."""
        return type(self)(weight, self.quantizer)

    def refill(self, weight: PackedMatrix) -> None:
        """Hold another weight of the same spec and shape, for all layers that share this kernel."""
        fresh = self.repacked(weight)
        fresh.set_bias(self.linear.bias)
        vars(self.linear).update(vars(fresh.linear))  # the layers hold what is called
        vars(self).update({name: vars(fresh)[name] for name in vars(fresh).keys() - _CALLED})

    def describe(self) -> str:
        """For the printed model."""
        inputs = "" if self.quantizer is None else f", inputs {self.quantizer.spec.describe()}"
        return self.spec.describe() + inputs

    def __getstate__(self) -> dict[str, object]:
        state = {name: value for name, value in self.__dict__.items() if name not in _CALLED - {"linear"}}
        return state if self._sparse is None else {**state, "_sparse": _outliers(self._sparse)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, _sparse(value, self.shape) if isinstance(value, Outliers) else value)
        self._settle()


class IntKernel(PackedKernel):
    """Integer weights and inputs (`kernels.int_linear`)."""

    linear_type: type[IntLinear] | type[IntLinearTwin] = IntLinear

    def __init__(self, weight: PackedMatrix, quantizer: InputQuantizer | None) -> None:
        """What `refuse_integers` and `refuse_inputs` have no word against."""
        super().__init__(weight, quantizer)
        assert quantizer is not None
        self._spans = Spans.of(weight.spec, weight.shape, quantizer)
        inputs = integer_inputs(quantizer, self._spans.lengths)
        scale, zero, minimum = integer_scales(weight, self._spans)
        bits = weight.spec.format.bits
        self.linear = self.linear_type.pack_words(
            weight.words, scale, bits, inputs, k=weight.shape[1], lengths=self._spans.lengths, zero=zero,
            minimum=minimum,
        )  # fmt: skip
        if isinstance(weight.scale, Tensor) and weight.scale.dtype == scale.dtype and bits > 1:
            self._scale = None
        if isinstance(zero, Tensor) and zero.dtype == torch.uint8 and bits <= 4:
            self._zero = None
        if minimum is not None and isinstance(weight.minimum, Tensor) and weight.minimum.dtype == minimum.dtype:
            self._minimum = None
        self._settle()

    def unpacked(self) -> tuple[Tensor, Tensor | QTensor, Tensor | None, Tensor | QTensor | None]:
        codes, scale, zero = self.linear.unpack()
        if self._scale is None:
            stored = stored_tiles(scale, self.spec, self.shape, self._spans.groups).to(plain_dtype(self.spec.scale))
        else:
            stored = self._scale
        return packed_codes(codes, self.spec.format.bits), stored, *self._stored_zeros(zero, self._spans.groups)


class CodeKernel(PackedKernel):
    """Weights that are looked up; inputs as they are, or rounded to FP8 or FP4 (`kernels.code_linear`)."""

    linear_type: type[CodeLinear] | type[CodeLinearTwin] = CodeLinear

    def __init__(self, weight: PackedMatrix, quantizer: InputQuantizer | None) -> None:
        """What `refuse_codes` and `refuse_float_inputs` have no word against."""
        super().__init__(weight, quantizer)
        given = code_scales(weight)
        inputs = None if quantizer is None else float_inputs(quantizer)
        bits, group = weight.spec.format.bits, weight.spec.granularity.tile(weight.shape)[1]
        self.linear = self.linear_type.pack_words(
            weight.words, given.scale, bits, given.table, k=weight.shape[1], group=group, zero=given.zero,
            minimum=given.minimum, outer=given.outer, inputs=inputs,
        )  # fmt: skip
        if isinstance(weight.scale, Tensor) and weight.scale.dtype == given.scale.dtype:
            self._scale = None
        elif isinstance(weight.scale, QTensor) and given.scale.dtype == torch.float8_e4m3fn:
            self._scale = replace(weight.scale, codes=weight.scale.codes[:0])  # its codes are in the panels
        if isinstance(given.zero, Tensor) and given.zero.dtype == torch.uint8:
            self._zero = None
        if given.minimum is not None and isinstance(weight.minimum, Tensor):
            self._minimum = weight.minimum if weight.minimum.dtype != given.minimum.dtype else None
        self._settle()

    def unpacked(self) -> tuple[Tensor, Tensor | QTensor, Tensor | None, Tensor | QTensor | None]:
        codes, scale, zero = self.linear.unpack()
        stored = stored_tiles(scale, self.spec, self.shape)
        if isinstance(self._scale, QTensor) and not self._scale.codes.numel():
            stored = replace(self._scale, codes=stored.view(torch.uint8))
        elif self._scale is not None:
            stored = self._scale
        return packed_codes(codes, self.spec.format.bits), stored, *self._stored_zeros(zero)


class IntTwin(IntKernel):
    """The same by the readable twin."""

    linear_type = IntLinearTwin


class CodeTwin(CodeKernel):
    """The same by the readable twin."""

    linear_type = CodeLinearTwin


def _signed(plain: Tensor, format: Format) -> Tensor:
    """Codes in their own dtype."""
    return (plain - format.code_offset).view(torch.int8) if format.code_dtype == torch.int8 else plain


def _sparse(outliers: Outliers, shape: tuple[int, int]) -> Tensor:
    """float32 [out, in], compressed rows."""
    parts = (outliers.starts, outliers.columns.to(torch.int32), outliers.values.to(torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the format a beta
        return torch.sparse_csr_tensor(*parts, shape, check_invariants=False)


def _outliers(sparse: Tensor) -> Outliers:
    columns = sparse.col_indices().to(column_dtype(sparse.shape[1]))
    return Outliers(sparse.crow_indices(), columns, sparse.values().to(torch.float16))
