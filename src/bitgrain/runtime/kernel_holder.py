"""A module that holds one packed weight in the layout of a kernel: what every kind of it does alike.

The kernel's own memory is the only copy of the codes; what a state_dict holds (`numerics.packed`, as `LowBitLinear` has
it) is made from it on the fly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.packed import PackedMatrix, pack_qtensor, packed_matrix, packed_specs
from bitgrain.runtime.lazy_weight import PackedWeight

_PREFIX = "packed_"
_KEYS = itertools.count()


class HeldKernel(Protocol):
    """A packed weight [out, in] and what computes with it."""

    spec: QuantSpec
    shape: tuple[int, int]

    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, as bytes; small tables apart."""
        ...

    def qtensor(self) -> QTensor:
        """The weight as it was given, unpacked."""
        ...

    def describe(self) -> str:
        """For the printed model."""
        ...


K = TypeVar("K", bound=HeldKernel)


class KernelHolder(PackedWeight, Generic[K]):
    """The part of a layer that has to do with its kernel.

    tied  another layer of the model holds the same kernel, and its state_dict has the weight
    """

    kernel: K
    tied: bool

    def hold(self, kernel: K) -> None:
        """Run `kernel` from now on."""
        self.kernel = kernel
        for name, tensor in kernel.tensors().items() if not self.tied else ():
            self.register_buffer(name, tensor, persistent=False)
        self._key = next(_KEYS)
        LAYERS[self._key] = self

    def _refill(self, weight: PackedMatrix) -> None:
        """Hold another weight of the same spec and shape."""
        raise NotImplementedError

    def qtensor(self) -> QTensor:
        """The weight, unpacked."""
        return self.kernel.qtensor()

    @property
    def packed_shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.kernel.shape

    @property
    def weight(self) -> Tensor:
        """See `PackedWeight`. In a compiled graph it is dense, if something is computed with it."""
        if torch.compiler.is_compiling():
            return cast(Tensor, dense_weight(self._key, *self.kernel.shape, self.like.dtype))
        return super().weight

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return sum(tensor.nbytes for tensor in self.kernel.tensors().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if (place := fn(self.like).device).type != "cpu":
            raise SchemeError(
                f"packed weights run on the CPU, not on {place}: load the model with execution='dequantize' for other "
                "devices"
            )
        super()._apply(fn, recurse)  # packed weights are bytes, which no cast touches
        self.hold(self.kernel)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # pyright: ignore[reportUnknownMemberType]
        if not self.tied:
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
        wanted = [] if self.tied else packed_specs(self.kernel.spec, self.kernel.shape)
        for name, dtype, shape in wanted:
            size = (*shape[:-1], shape[-1] * dtype.itemsize)
            tensor = given.pop(name, None)
            if tensor is None:
                missing_keys.append(start + name)
            elif tuple(tensor.shape) != size or tensor.dtype != torch.uint8:
                error_msgs.append(f"{start}{name}: {tuple(tensor.shape)} {tensor.dtype}, the layer has {size} bytes")
            else:
                parts[name] = tensor.detach().cpu().clone().view(dtype)
        unexpected_keys += [start + name for name in given] if strict else []
        if not self.tied and len(parts) == len(wanted):
            self._refill(packed_matrix(parts, self.kernel.spec, self.kernel.shape))

    def __getstate__(self) -> dict[str, Any]:
        held = self.kernel.tensors()  # views of what the kernel has, and other dtypes, which torch.save does not take
        buffers = {name: value for name, value in self._buffers.items() if name not in held}
        return {**{name: value for name, value in self.__dict__.items() if name != "_key"}, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.hold(self.kernel)


LAYERS: WeakValueDictionary[int, KernelHolder[Any]] = WeakValueDictionary()
"""Layers by number, by which a compiled graph calls them: it holds no objects."""


@torch.library.custom_op("bitgrain::dense_weight", mutates_args=())
def dense_weight(key: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight of the layer of this number in a compiled graph."""
    return LAYERS[key].dequantize()


@dense_weight.register_fake
def _(key: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype)
