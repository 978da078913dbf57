"""A decoder block in one native call: norm, q k v, rotary positions, cache, attention, o, norm, gate, up, down.

`DecoderBlock.run` is the whole block for a few new tokens of each sequence; `start` and `finish` are what stands before
and after an attention that something else computes. Both keep sums in float32 between the products. What a block is
made of is said by `AttentionPart` and `MlpPart`; the twin is the module itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.code_linear import CodeLinear
from bitgrain.kernels.decoder_caches import BlockCache
from bitgrain.kernels.dense_rows import DenseLinear
from bitgrain.kernels.int_linear import IntLinear
from bitgrain.kernels.native import DTYPES, native
from bitgrain.kernels.rows import ACTS, MAX_HEAD, ROTARY, Act, Rotary, RowNorm

Turned = tuple[int, int, int, int, int]
"""Positions at the seam: addresses of cos and sin, their dtype, how many there are, how many features they turn."""
Weight = IntLinear | CodeLinear | DenseLinear


@dataclass(frozen=True)
class AttentionPart:
    """x + o(attention(q, k, v)) with q, k, v read off norm(x). Weights may be of any kinds.

    qkv               three weights, or one that writes q, k and v side by side
    q_norm, k_norm    of each head, before it is rotated
    scale             of the scores
    """

    norm: RowNorm
    qkv: tuple[Weight, ...]
    o: Weight
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    scale: float
    q_norm: RowNorm | None = None
    k_norm: RowNorm | None = None

    @property
    def width(self) -> int:
        """Columns of q, k and v together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class MlpPart:
    """x + down(act(gate) * up) with gate, up read off norm(x); `act(gate)` where there is no up.

    gate_up  (gate, up), or (gate,), or one weight that writes gate and up side by side where `joined`
    """

    norm: RowNorm
    gate_up: tuple[Weight, ...]
    down: Weight
    act: Act
    joined: bool = False


class DecoderBlock:
    """Raises KernelError for parts whose sizes do not fit."""

    def __init__(self, attention: AttentionPart, mlp: MlpPart | None) -> None:
        self.attention, self.mlp = attention, mlp
        self.hidden = attention.norm.width
        _check(attention, mlp, self.hidden)
        self._products: list[Any] = []
        self.handle: Any = native().DecoderBlock()
        q, k = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.handle.set_attention(
            attention.norm.handle, self._product(attention.qkv), attention.width, [0, q, q + k], len(attention.qkv),
            attention.heads, attention.kv_heads, attention.head_dim, _handle(attention.q_norm),
            _handle(attention.k_norm), ROTARY[attention.rotary], attention.scale, self._product((attention.o,)),
        )  # fmt: skip
        if mlp is not None:
            width = mlp.down.k
            has_up = mlp.joined or len(mlp.gate_up) == 2
            self.handle.set_mlp(
                mlp.norm.handle, self._product(mlp.gate_up), width, 0, width if has_up else -1,
                2 * width if has_up else width, len(mlp.gate_up), ACTS[mlp.act], self._product((mlp.down,)),
            )  # fmt: skip

    def start(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """x [batch, tokens, hidden] -> [batch, tokens, q + k + v], normed and rotated."""
        self._check(x)
        m = x.shape[0] * x.shape[1]
        out = torch.empty(*x.shape[:2], self.attention.width, dtype=x.dtype)
        self.handle.start(
            x.data_ptr(), DTYPES[x.dtype], m, *address_positions(cos, sin), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output, of its input x [batch, tokens, hidden] and attention's output before o."""
        self._check(x)
        if attended.dtype != x.dtype or not attended.is_contiguous() or attended.numel() != self._attended(x):
            raise KernelError(
                f"attention's output {tuple(attended.shape)} {attended.dtype} does not fit {tuple(x.shape)}"
            )
        y = torch.empty_like(x)
        m = x.shape[0] * x.shape[1]
        self.handle.finish(x.data_ptr(), DTYPES[x.dtype], m, attended.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    def run(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: BlockCache,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """x [batch, tokens, hidden], contiguous -> the block's output; None where keys or values cannot be packed, and
        then nothing is added to the cache.

        cache  keys and values of past and new tokens; those of the new ones are written to the end
        mask   bool [batch or 1, heads or 1, tokens or 1, past and new], True where a token is seen; without one each
               token sees those before it
        """
        self._check(x)
        place = cache.place(x, self.attention.kv_heads, self.attention.head_dim)
        y = torch.empty_like(x)
        kind, address, strides = 0, 0, (0, 0, 0)
        if mask is not None:
            full = (x.shape[0], self.attention.heads, x.shape[1], cache.tokens)
            fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape, full, strict=True))
            if not fits or mask.shape[3] != full[3] or mask.dtype != torch.bool or mask.stride(3) != 1:
                raise KernelError(f"a mask {tuple(mask.shape)} {mask.dtype} does not fit {full}")
            kind, address = 1, mask.data_ptr()
            a, b, c = (0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride(), strict=False))
            strides = (a, b, c)
        good = self.handle.run(
            x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], *address_positions(cos, sin), place, kind, address,
            *strides, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if not good:
            return None
        cache.written()
        return y

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.hidden or not x.is_contiguous() or x.dtype not in DTYPES:
            raise KernelError(f"a block of {self.hidden} features cannot read {tuple(x.shape)} {x.dtype}")

    def _attended(self, x: Tensor) -> int:
        return x.shape[0] * x.shape[1] * self.attention.heads * self.attention.head_dim

    def _product(self, weights: Sequence[Weight]) -> Any:
        """Of weights that read the same rows: in one product for each kind of them."""
        kinds: dict[object, list[int]] = {}
        for place, one in enumerate(weights):
            kinds.setdefault(_kind(one), []).append(place)
        parts = [_product_of_one_kind([weights[place] for place in places]) for places in kinds.values()]
        self._products += parts
        if len(parts) == 1:
            return parts[0]
        self._products.append(native().MixedProducts(weights[0].k, parts, list(kinds.values())))
        return self._products[-1]


class DecoderStack:
    """Blocks one behind the other; each one has an MLP."""

    def __init__(self, blocks: Sequence[DecoderBlock]) -> None:
        self.blocks = list(blocks)
        self.heads = [(one.attention.kv_heads, one.attention.head_dim) for one in blocks]
        """Heads of keys and values of each one, and their size."""
        self.handle: Any = native().DecoderStack([one.handle for one in blocks])

    def run(self, x: Tensor, turned: Turned, caches: Sequence[BlockCache]) -> Tensor | None:
        """As `DecoderBlock.run` of each, bit for bit; turned: by `address_positions`; caches: of each."""
        places = array("q")
        for cache, (heads, size) in zip(caches, self.heads, strict=True):
            places.extend(cache.place(x, heads, size))
        y = self.run_at(x, turned, places)
        if y is None:
            return None
        for cache in caches:
            cache.written()
        return y

    def run_at(self, x: Tensor, turned: Turned, places: array[int]) -> Tensor | None:
        """The same; places: what `BlockCache.place` says of each cache, one behind the other."""
        y = torch.empty_like(x)
        good = self.handle.run(
            x.data_ptr(), DTYPES[x.dtype], x.shape[0], x.shape[1], *turned, places.buffer_info()[0],
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y if good else None


def address_positions(cos: Tensor | None, sin: Tensor | None) -> Turned:
    """cos and sin [.., turned], contiguous, as native code is told; whoever has them keeps them meanwhile."""
    if cos is None or sin is None:
        return 0, 0, 0, 1, 0
    width = cos.shape[-1]
    return cos.data_ptr(), sin.data_ptr(), DTYPES[cos.dtype], cos.numel() // width, width


def _handle(norm: RowNorm | None) -> Any:
    return None if norm is None else norm.handle


def _check(attention: AttentionPart, mlp: MlpPart | None, hidden: int) -> None:
    q, k, size = attention.heads, attention.kv_heads, attention.head_dim
    shapes = [(one.n, one.k) for one in attention.qkv]
    fits = shapes in ([(q * size, hidden), (k * size, hidden), (k * size, hidden)], [(attention.width, hidden)])
    if not fits or (attention.o.n, attention.o.k) != (hidden, q * size) or q % k or not 0 < size <= MAX_HEAD:
        raise KernelError(f"q, k, v {shapes} and o {(attention.o.n, attention.o.k)} do not fit {q}/{k} heads of {size}")
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None and norm.width != size:
            raise KernelError(f"a norm of {norm.width} features does not fit heads of {size}")
    if mlp is None:
        return
    width, shapes = mlp.down.k, [(one.n, one.k) for one in mlp.gate_up]
    wanted = [(2 * width, hidden)] if mlp.joined else [(width, hidden)] * len(mlp.gate_up)
    if shapes != wanted or len(shapes) > 2 or mlp.down.n != hidden or mlp.norm.width != hidden:
        raise KernelError(f"gate, up {shapes} and down {(mlp.down.n, mlp.down.k)} do not fit {hidden} features")


def _kind(weight: Weight) -> object:
    """Alike for weights whose products are one: they read the rows in one form."""
    if isinstance(weight, DenseLinear):
        return weight.weight.dtype
    if isinstance(weight, CodeLinear):
        return weight.bits, weight.group, weight.inputs
    return weight.bits, weight.lengths, weight.inputs, weight.zeros, weight.zero


def _product_of_one_kind(weights: Sequence[Weight]) -> Any:
    addresses, first = [one.handle.weights_at() for one in weights], weights[0]
    if isinstance(first, DenseLinear):
        return native().DenseProducts(addresses)
    if isinstance(first, CodeLinear):
        return native().CodeProducts(addresses)
    return native().IntProducts(addresses, first.handle.spec_at())
