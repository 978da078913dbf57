"""Caches of keys and values as a native decoder block reads and extends them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.packed_states import PackedStates


@dataclass(frozen=True)
class DenseCache:
    """keys, values [batch, kv_heads, past and new tokens, head_dim] of the dtype of x, whole rows side by side."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """Past and new."""
        return self.keys.shape[2]

    def place(self, x: Tensor, heads: int, size: int) -> list[int]:
        """As native code is told, for `heads` of `size` channels. Raises KernelError where they do not fit x."""
        shape = (x.shape[0], heads, self.tokens, size)
        for one in (self.keys, self.values):
            rows = one.shape == shape and one.stride()[2:] == (size, 1) and shape[2] >= x.shape[1]
            if not rows or one.dtype != x.dtype:
                raise KernelError(f"a cache {tuple(one.shape)} {one.dtype} does not fit {_wanted(x, heads, size)}")
        (a, b, _, _), (c, d, _, _) = self.keys.stride(), self.values.stride()
        return [0, self.tokens, self.keys.data_ptr(), self.values.data_ptr(), a, b, c, d]

    def written(self) -> None:
        """The new tokens are there."""


@dataclass(frozen=True)
class PackedCache:
    """Keys and values in few bits, to which `new` tokens are added once they are packed."""

    keys: PackedStates
    values: PackedStates
    new: int

    @property
    def tokens(self) -> int:
        """Past and new."""
        return self.keys.tokens + self.new

    def place(self, x: Tensor, heads: int, size: int) -> list[int]:
        """The same, with room for the new tokens. Raises KernelError where they do not fit x."""
        wanted = (x.shape[0], heads, size)
        for one in (self.keys, self.values):
            if (one.batch, one.heads, one.size) != wanted or self.new != x.shape[1]:
                raise KernelError(
                    f"a cache of {(one.batch, one.heads, one.size)} does not fit {_wanted(x, heads, size)}"
                )
            one.make_room(self.new)
        keys, values = self.keys, self.values
        if (keys.first, keys.tokens, keys.bits) != (values.first, values.tokens, values.bits):
            raise KernelError("packed keys and values do not belong together")
        return [1, self.tokens, keys.handle.at(), values.handle.at(), keys.first, 0, 0, 0]

    def written(self) -> None:
        """The new tokens are there."""
        self.keys.tokens += self.new
        self.values.tokens += self.new


BlockCache = DenseCache | PackedCache


def _wanted(x: Tensor, heads: int, size: int) -> str:
    return f"{heads} heads of {size} for inputs {tuple(x.shape)} {x.dtype}: make a new one for each batch"
