"""Seeing what goes into and comes out of the matrices of a module while it runs, without touching the module.

A TorchFunctionMode belongs to the thread that enters it: several threads may run one module, each with its own Watch.
It sees every product with a watched parameter, whether a Linear, a Conv1D or a stack of experts makes it, with inputs
as they are multiplied (after any input quantizer).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight"),
    torch.addmm: ("input", "mat1", "mat2"),
    Tensor.addmm: ("self", "mat1", "mat2"),
    torch.matmul: ("input", "other"),
    Tensor.matmul: ("self", "other"),
    Tensor.__matmul__: ("self", "other"),
    **dict.fromkeys((torch.bmm, torch.mm), ("input", "mat2")),
    **dict.fromkeys((Tensor.bmm, Tensor.mm), ("self", "mat2")),
}
"""Function -> its first arguments: the last of them is the weight, the inputs stand before it."""
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}


@dataclass(frozen=True)
class Key:
    """One matrix: a parameter's name, and which of its stacked experts; None where it is not a stack."""

    name: str
    expert: int | None = None


class Done(Exception):
    """Raised by a listener to leave the module as soon as everything wanted has been seen."""


class Watch(TorchFunctionMode):
    """While entered, `product(key, inputs)` is called before every product with one of the parameters.

    parameters  name -> parameter of the module (2-D, or 3-D stacks of matrices)
    product     inputs [.., in_features]; if it returns a tensor, that is multiplied in their place
    output      `output(key, outputs)` is called after it, outputs [.., out_features]
    total       `total(key, other, result)` is called when the output of a product, unchanged, has been added to `other`
                of the same shape: the residual stream of a layer that writes into it
    summed      names for which `total` is wanted (their outputs are kept meanwhile); None: all
    A listener may raise Done to leave; catch it around the `with`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        product: Callable[[Key, Tensor], Tensor | None],
        total: Callable[[Key, Tensor, Tensor], None] | None = None,
        output: Callable[[Key, Tensor], None] | None = None,
        summed: Container[str] | None = None,
    ) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in parameters.items()}
        self._product = product
        self._total = total
        self._output = output
        self._summed = summed
        self._outputs: dict[int, tuple[Key, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        named = _PRODUCTS.get(func, ())
        if any(name in kwargs for name in named):
            args = (*args, *(kwargs[name] for name in named[len(args) :] if name in kwargs))
            kwargs = {name: value for name, value in kwargs.items() if name not in named}
        place = len(named) - 1
        if named and len(args) > place and isinstance(args[place], Tensor):
            found = self._names.get(args[place].untyped_storage().data_ptr())
            if found is not None:
                key = _key(*found, args[place])
                replaced = self._product(key, args[place - 1])
                if replaced is not None:
                    args = (*args[: place - 1], replaced, *args[place:])
                result = func(*args, **kwargs)
                if self._total is not None and (self._summed is None or key.name in self._summed):
                    self._outputs[result.data_ptr()] = (key, result)  # kept alive: no other tensor gets its address
                if self._output is not None:
                    self._output(key, result)
                return result
        result = func(*args, **kwargs)
        if self._total is not None and func in _SUMS and len(args) == 2:
            for one, other in (args, args[::-1]):
                if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
                    written = self._outputs.get(one.data_ptr())
                    if written is not None and written[1].numel() == one.numel():
                        self._total(written[0], other, result)
                        break
        return result


def _key(name: str, parameter: Tensor, weight: Tensor) -> Key:
    """Which matrix of a stack a product used: where in the parameter's memory its weight begins."""
    if parameter.ndim < 3 or weight.ndim > 2:
        return Key(name)
    size = parameter[0].numel()
    return Key(name, (weight.storage_offset() - parameter.storage_offset()) // size)


def parameters_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of a module by their names."""
    return {name: module.get_parameter(name) for name in names}
