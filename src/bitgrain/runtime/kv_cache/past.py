"""What a cache returns in place of keys or values that are packed: a tensor in name, unpacked only if need be.

`scaled_dot_product_attention` with a `Past` for keys and one for values runs the kernel that reads the packed codes.
Every other function of torch gets the numbers: eager attention, a model's own code, a look at the keys work as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitgrain.errors import ModelError
from bitgrain.kernels.attention import MOST_QUERIES, attend_dense, attend_packed
from bitgrain.kernels.native import is_available
from bitgrain.kernels.packed_states import BITS
from bitgrain.runtime.kv_cache.tiled import Tiled
from bitgrain.runtime.operators import Operator, find_operator, register_operator

_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_sparse")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
"""Questions that need no numbers."""


class Past(Tensor):
    """Tokens of `held`: shape, dtype and device of keys or values that are not unpacked yet."""

    held: Tiled
    begin: int  # the first token's number, counted from the first that the cache was ever given
    changes: int

    @staticmethod
    def of(held: Tiled, count: int, like: Tensor) -> Past:
        """The newest `count` tokens of `held`, in the dtype of `like`."""
        packed = held.packed
        past = like.new_full((1,), torch.nan).expand(packed.batch, packed.heads, count, packed.size).as_subclass(Past)
        past.held, past.changes = held, held.changes
        past.begin = packed.start + packed.first + packed.tokens - count
        return past

    def place(self) -> tuple[int, int] | None:
        """(first, count) of its tokens in the memory now; None where the cache has moved on and they are gone."""
        first = self.begin - self.held.packed.start
        return (first, self.shape[2]) if self.changes == self.held.changes and first >= 0 else None

    def numbers(self) -> Tensor:
        """All of them. Raises ModelError where the cache has moved on and they are gone."""
        place = self.place()
        if place is None:
            raise ModelError("these keys and values were returned before the cache was cropped, reordered or moved on")
        return self.held.packed.read(self.dtype, place)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs)
        if func is scaled_dot_product_attention:
            found = _attend(*args, **kwargs)
            if found is not None:
                return found
        return func(*(_plain(one) for one in args), **{name: _plain(one) for name, one in kwargs.items()})


def _plain(given: Any) -> Any:
    """With numbers in place of every Past."""
    if isinstance(given, Past):
        return given.numbers()
    if isinstance(given, (tuple, list)):
        return type(given)(_plain(one) for one in given)
    if isinstance(given, dict):
        return {key: _plain(one) for key, one in given.items()}
    return given


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """[batch, heads, queries, size], or None where no kernel serves this."""
    if not isinstance(key, Past) or not isinstance(value, Past) or isinstance(query, Past):
        return None
    keys, values, place = key.held, value.held, key.place()
    if (
        dropout_p
        or is_causal
        or query.ndim != 4
        or (attn_mask is not None and attn_mask.ndim != 4)
        or query.shape[2] > MOST_QUERIES
        or query.dtype != key.dtype
        or (query.shape[1] != keys.packed.heads and not enable_gqa)
        or (torch.is_grad_enabled() and query.requires_grad)
        or place is None
        or place != value.place()
    ):
        return None
    kernel = find_operator("decode attention", keys.formats, "cpu").kernel
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = kernel(query, keys.packed, values.packed, place=place, scaling=scaling, mask=attn_mask)
    return found.transpose(1, 2)


def register_decode_attention() -> None:
    """Put the kernels into the operator table, where they are built."""
    if is_available():
        register_operator(Operator("decode attention", ("-", "-"), attend_dense, device="cpu"))
        for bits in BITS:
            register_operator(
                Operator("decode attention", (f"uint{bits} per_channel",) * 2, attend_packed, device="cpu")
            )
