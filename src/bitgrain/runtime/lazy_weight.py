"""The weight of a layer that holds none: a tensor that is dequantized when something is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor


class PackedWeight(nn.Module):
    """A layer whose weight is a QTensor in some packed form: what it shows to code that expects a dense one.

    stored  the dtype that the weight had when it was quantized: the dense weight is rounded to it first, as a
            dequantized checkpoint is
    """

    like: Tensor  # empty: has the dtype and device of the dense weight, through every `.to`
    stored: torch.dtype

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        raise NotImplementedError

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Of the weight, as it is quantized."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The dense weight, as it is quantized; a new tensor at every call."""
        return self.qtensor().dequantize(self.stored).to(self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """`dequantize` once something is computed with it; what would write to it gets a SchemeError."""
        return LazyWeight.of(self)


class LazyWeight(Tensor):
    """A tensor with the shape, dtype and device of a layer's dense weight, and without its memory.

    Every operation sees `dequantize()`; an embedding's look-up only the rows that it reads. Assigning to its `data`
    would be lost, and raises SchemeError.
    """

    _layer: PackedWeight

    @staticmethod
    def of(layer: PackedWeight) -> LazyWeight:
        """That of a layer."""
        like = layer.like
        found = Tensor._make_wrapper_subclass(LazyWeight, layer.packed_shape, dtype=like.dtype, device=like.device)
        found._layer = layer
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == _SET_DATA:
            raise SchemeError(
                "this weight is kept in low bits and cannot be changed in place: merge adapters with a LoraConfig from "
                "bitgrain.training.lora.lora_config, or make the layer dense first (LowBitLinear.to_dense)"
            )
        if func is F.embedding and len(args) > 1 and isinstance(args[1], LazyWeight):
            look_up = getattr(args[1]._layer, "look_up", None)
            if look_up is not None:
                return look_up(args[0])
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        dense = tree_map_only(LazyWeight, lambda one: one._layer.dequantize(), (tuple(args), kwargs or {}))
        return func(*dense[0], **dense[1])


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
