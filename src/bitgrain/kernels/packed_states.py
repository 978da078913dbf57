"""Keys, or values, of the past in 8, 4 or 2 bits, as the attention kernels read them: memory, and tokens in and out.

Each token of each head has a scale and a real zero point in float16, x = scale (code - zero). Codes, scales and zero
points are those that `numerics.quantize` gives for a real zero point and limits that are the extremes. The layout is
described in native/attention/packed.h: tiles of 64 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.memory import large_memory
from bitgrain.kernels.native import DTYPES, native

TILE = 64
BITS = (8, 4, 2)
_GROW = 2
"""Tiles that memory is taken for at a time, at least; a sixteenth of what is held, if that is more."""


def fits(size: int) -> bool:
    """Whether there are kernels for heads of so many channels."""
    return size % 16 == 0 and size <= 256


class PackedStates:
    """[batch, heads, tokens, size]. values: whether they are values, which lie otherwise than keys.

    first, tokens  which tokens of the memory are held: dropped ones stay in front until their tile goes
    start          the number of the memory's first token, counted from the first that was ever added
    Raises KernelError for other bits, and for heads that no kernel fits.
    """

    def __init__(self, batch: int, heads: int, size: int, bits: int, *, values: bool) -> None:
        if bits not in BITS or not fits(size):
            raise KernelError(f"no kernel for {bits}-bit keys and values with heads of {size} channels")
        self.batch, self.heads, self.size, self.bits, self.values = batch, heads, size, bits, values
        self.first = self.tokens = self.start = self.tiles = 0
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None
        self.handle: Any = native().PackedSide(size, bits, values, batch * heads)

    @property
    def nbytes(self) -> int:
        """Of the tokens that are held."""
        return self.batch * self.heads * self.tokens * (self.size * self.bits // 8 + 4)

    @property
    def allocated(self) -> int:
        """With the memory for tokens to come, and of dropped ones."""
        return sum(one.nbytes for one in self._memory) if self._memory else 0

    def append(self, x: Tensor) -> bool:
        """Round and add tokens [batch, heads, n, size]; False, and nothing is added, where one holds NaN or Inf or has
        a scale beyond float16."""
        if x.shape[:2] != (self.batch, self.heads) or x.shape[3] != self.size or x.dtype not in DTYPES:
            raise KernelError(f"states {list(x.shape)} {x.dtype} do not fit {self.batch} texts, {self.heads} heads")
        count = x.shape[2]
        self.make_room(count)
        last = self.first + self.tokens
        x = x if x.stride(3) == 1 else x.contiguous()
        strides = x.stride()[:3]
        threads = torch.get_num_threads()
        good: bool = self.handle.pack(x.data_ptr(), DTYPES[x.dtype], self.heads, strides, last, count, threads)
        if good:
            self.tokens += count
        return good

    def read(self, dtype: torch.dtype, place: tuple[int, int] | None = None) -> Tensor:
        """Tokens (first, count) of the memory, None: all that are held, as numbers [batch, heads, tokens, size]."""
        first, count = (self.first, self.tokens) if place is None else place
        y = torch.empty(self.batch, self.heads, count, self.size, dtype=dtype)
        strides, threads = y.stride()[:3], torch.get_num_threads()
        if count:
            self.handle.read(y.data_ptr(), DTYPES[dtype], self.heads, strides, first, count, threads)
        return y

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        count = min(count, self.tokens)
        self.first, self.tokens = self.first + count, self.tokens - count

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        self.tokens -= min(count, self.tokens)

    def select(self, rows: Tensor) -> None:
        """Let the batch be `rows` of it, int64 [new batch]."""
        before, self.batch = self.batch, len(rows)
        self.handle = native().PackedSide(self.size, self.bits, self.values, self.batch * self.heads)
        if self._memory is not None:
            self._attach(*(one.unflatten(1, (before, -1)).index_select(1, rows).flatten(1, 2) for one in self._memory))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = native().PackedSide(self.size, self.bits, self.values, self.batch * self.heads)
        if self._memory is not None:
            self._attach(*self._memory)

    def make_room(self, count: int) -> None:
        """Memory for so many more tokens; what was dropped at the front is given back, tile by tile."""
        if self.first + self.tokens + count <= self.tiles * TILE:
            return
        gone, used = self.first // TILE, -(-(self.first + self.tokens) // TILE)
        self.first, self.start = self.first - gone * TILE, self.start + gone * TILE
        needed = -(-(self.first + self.tokens + count) // TILE)
        tiles, pairs = needed + max(_GROW - 1, needed // 16), self.batch * self.heads
        nbytes = TILE * self.size * self.bits // 8
        codes = large_memory(tiles * pairs * nbytes).view(tiles, pairs, nbytes)
        scales, zeros = torch.zeros(2, tiles, pairs, TILE, dtype=torch.float16)
        if self._memory is not None:
            for old, new in zip(self._memory, (codes, scales, zeros), strict=True):
                new[: used - gone] = old[gone:used]
        self._attach(codes, scales, zeros)

    def _attach(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self._memory, self.tiles = (codes, scales, zeros), len(codes)
        self.handle.attach(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr())
