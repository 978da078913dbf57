"""Experts that a model keeps in one 3-D parameter, each matrix packed: the module's own forward multiplies by them.

What stands in the parameter's place takes part in products, one expert at a time (transformers' "eager" experts) or all
at once (bmm); anything else that is done with it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.runtime.quant_linear import QuantLinear

_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}
_BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class QuantExperts(nn.ModuleList):
    """In the place of a parameter [experts, out, in], or [experts, in, out] where `transposed`.

    experts  of each: the layers whose outputs, joined, are those of its matrix (gate and up are often stored apart)
    Indexed with one expert it gives what can be multiplied by; its state_dict has each layer's, as `0.0.packed_codes`.
    """

    def __init__(self, experts: Iterable[Sequence[QuantLinear]], transposed: bool = False) -> None:
        super().__init__(nn.ModuleList(parts) for parts in experts)
        self.transposed = transposed

    @property
    def shape(self) -> torch.Size:
        """As the parameter had it."""
        return torch.Size([len(self), *self[0].shape])

    @property
    def dtype(self) -> torch.dtype:
        """That of the dense weights."""
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return self[0].device

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, idx: Any) -> ExpertMatrix:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(idx, Tensor) and idx.ndim:
            raise _refusal("the choice of several experts at once (set their implementation to 'eager')")
        parts = self._modules[str(range(len(self))[int(idx)])]
        return ExpertMatrix(cast(Sequence[QuantLinear], parts), self.transposed)

    def __getattr__(self, name: str) -> Any:
        if name not in self._modules and not name.startswith("_") and hasattr(Tensor, name):
            raise _refusal(f"Tensor.{name}")
        return super().__getattr__(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _BATCHED and len(args) == 2 and isinstance(args[1], cls) and args[0].ndim == 3 and not kwargs:
            return torch.stack([x @ args[1][i] for i, x in enumerate(args[0])])
        raise _refusal(_name(func))


class ExpertMatrix:
    """One expert's matrix [out, in] as F.linear takes it, or [in, out] (`transposed`) as x @ W does."""

    def __init__(self, parts: Sequence[QuantLinear], transposed: bool) -> None:
        self._parts, self._transposed = parts, transposed

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, as it lies."""
        shape = sum(part.out_features for part in self._parts), self._parts[0].in_features
        return torch.Size(shape[::-1] if self._transposed else shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the dense weight."""
        return self._parts[0].like.dtype

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return self._parts[0].like.device

    @property
    def T(self) -> Self:
        """The other way."""
        return type(self)(self._parts, not self._transposed)

    mT = T

    def t(self) -> Self:
        """The other way."""
        return self.T

    def multiply(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        outputs = [part(x) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Tensor, name):
            raise _refusal(f"Tensor.{name}")
        raise AttributeError(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x, matrix, rest = args[0], args[1], {**(kwargs or {})}
            if func is F.linear and not matrix._transposed and len(args) <= 3:
                bias = args[2] if len(args) == 3 else rest.pop("bias", None)
                if not rest:
                    y = matrix.multiply(x)
                    return y if bias is None else y + bias
            if func in _MATMUL and matrix._transposed and not rest and len(args) == 2:
                return matrix.multiply(x)
        raise _refusal(_name(func))


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _refusal(what: str) -> SchemeError:
    return SchemeError(
        f"packed experts take part in products only, not in {what}: ask for execution='dequantize' (dense weights, "
        "simulated activations)"
    )
