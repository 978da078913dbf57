"""Keys, or values, of one layer: packed blocks of tokens, and behind them the newest tokens as they are.

Blocks lie one behind the other in memory, [blocks, batch, heads, tokens of a block, bytes], so that tokens are added at
the end and dropped at the front without a copy of the rest. What is removed inside a block (a crop that cuts it, a
window that leaves it) stays there as dead tokens until the whole block goes: nothing is rounded twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.numerics import QuantSpec, quantize
from bitgrain.numerics.packing import pack, unpack
from bitgrain.runtime.kv_cache.schemes import tokens_of

_GROW = 128
"""Tokens that memory is taken for at a time."""


class Held:
    """Tensors are [b, h, tokens, d]. scale: of a static spec, [1, 1] float32 (None: 1); the others: `CacheScheme`."""

    def __init__(self, spec: QuantSpec, *, recent: int, step: int, scale: Tensor | None = None) -> None:
        self.spec, self.recent, self.step = spec, recent, step
        self.scale = torch.ones(1, 1) if scale is None and not spec.dynamic else scale
        self.rows = tokens_of(spec)
        self.clear()

    def clear(self) -> None:
        """Hold nothing, of no shape."""
        self._codes: Tensor | None = None
        self._scales: Tensor | None = None
        self._zeros: Tensor | None = None
        self._newest: Tensor | None = None
        self._first = self._last = 0  # blocks in use
        self._dead: list[tuple[int, int]] = []  # of the tokens in these blocks, from..to

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self._live + self._newest_tokens

    @property
    def nbytes(self) -> int:
        """Of everything held, but not of memory taken for tokens to come."""
        held = [one[self._first : self._last] for one in (self._codes, self._scales, self._zeros) if one is not None]
        return sum(one.nbytes for one in held) + (0 if self._newest is None else self._newest.nbytes)

    @property
    def allocated(self) -> int:
        """With the memory that is taken for tokens to come, or that dropped ones left."""
        held = (self._codes, self._scales, self._zeros, self._newest)
        return sum(one.nbytes for one in held if one is not None)

    @property
    def _packed_tokens(self) -> int:
        return (self._last - self._first) * self.rows

    @property
    def _newest_tokens(self) -> int:
        return 0 if self._newest is None else self._newest.shape[2]

    def append(self, x: Tensor) -> Tensor:
        """Add tokens [b, h, n, d]; returns all that are held, as a model shall see them now, in the dtype of x.

        Tokens of a scheme without newest ones are seen rounded at once; else those that this call makes too old are
        seen as they are for the last time.
        """
        newest = x if self._newest is None else torch.cat([self._newest, x], dim=2)
        at_once = self.step == 1 and self.recent == 0
        seen = None if at_once else self._read(newest)
        old = max(0, newest.shape[2] - self.recent) // self.step * self.step
        if old:
            self._add(newest[:, :, :old])
        self._newest = None if at_once else newest[:, :, old:].clone()
        return self._read(x[:, :, :0]) if seen is None else seen

    def drop_oldest(self, count: int) -> None:
        """Forget the first tokens."""
        live = self._live
        if count >= live:
            if self._newest is not None:
                self._newest = self._newest[:, :, count - live :].clone()
            self._first, self._dead = self._last, []
            return
        if count:
            stop = self._place(count)
            self._dead = [(0, stop), *((max(a, stop), b) for a, b in self._dead if b > stop)]
        whole = self._dead[0][1] // self.rows if self._dead and self._dead[0][0] == 0 else 0
        self._first += whole
        moved = [(max(0, start - whole * self.rows), stop - whole * self.rows) for start, stop in self._dead]
        self._dead = [(start, stop) for start, stop in moved if stop > start]

    def crop(self, count: int) -> None:
        """Forget the newest tokens."""
        newest = self._newest_tokens
        if count <= newest:
            if count and self._newest is not None:
                self._newest = self._newest[:, :, : newest - count].clone()
            return
        if self._newest is not None:
            self._newest = self._newest[:, :, :0].clone()
        left = self._live - (count - newest)
        end = self._place(left - 1) + 1 if left > 0 else 0
        blocks = -(-end // self.rows)
        self._last = self._first + blocks
        self._dead = [(start, min(stop, end)) for start, stop in self._dead if start < end]
        if end < blocks * self.rows:
            self._dead.append((end, blocks * self.rows))

    def select(self, rows: Tensor) -> None:
        """Let the batch be `rows` of it, int64 [new batch]."""
        for name in ("_codes", "_scales", "_zeros"):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                setattr(self, name, held[self._first : self._last].index_select(1, rows.to(held.device)))
        self._first, self._last = 0, self._last - self._first
        if self._newest is not None:
            self._newest = self._newest.index_select(0, rows.to(self._newest.device))

    def repeat(self, times: int) -> None:
        """Each row of the batch `times` times, one behind the other."""
        batch = 0 if self._newest is None else self._newest.shape[0]
        batch = batch if self._codes is None else self._codes.shape[1]
        self.select(torch.arange(batch).repeat_interleave(times))

    def to(self, device: torch.device | str) -> None:
        """Move everything."""
        for name in ("_codes", "_scales", "_zeros", "_newest"):
            held: Tensor | None = getattr(self, name)
            if held is not None:
                setattr(self, name, held.to(device, non_blocking=True))

    def _add(self, x: Tensor) -> None:
        """Round and pack tokens [b, h, n, d], n a multiple of the block."""
        batch, heads, count, _ = x.shape
        blocks = count // self.rows
        x = x.unflatten(2, (blocks, self.rows)).permute(2, 0, 1, 3, 4)  # [blocks, b, h, rows, d]
        scale = None if self.scale is None else self.scale.to(x.device)
        try:
            q = quantize(x, self.spec, scale=scale, name="the keys or values of a cache")
        except NumericsError as error:
            raise NumericsError(f"{str(error).partition(';')[0]}: run the model in bfloat16 or float32") from error
        codes = pack(q.unsigned_codes(), self.spec.format.bits, torch.uint8)
        parts: dict[str, Tensor | None] = {"_codes": codes, "_scales": None, "_zeros": None}
        if self.scale is None:
            assert isinstance(q.scale, Tensor)
            parts["_scales"] = q.scale.view(blocks, batch, heads, -1)
            parts["_zeros"] = None if q.zero is None else q.zero.view(blocks, batch, heads, -1)
        self._make_room(parts, blocks)
        for name, part in parts.items():
            if part is not None:
                getattr(self, name)[self._last : self._last + blocks] = part
        self._last += blocks

    def _make_room(self, parts: dict[str, Tensor | None], blocks: int) -> None:
        """Memory for so many more blocks; what was dropped at the front is given back."""
        if self._codes is not None and self._last + blocks <= len(self._codes):
            return
        used, grow = self._last - self._first, max(1, _GROW // self.rows)
        capacity = -(-(used + blocks) // grow) * grow
        for name, part in parts.items():
            if part is not None:
                old: Tensor | None = getattr(self, name)
                room = part.new_empty(capacity, *part.shape[1:])
                if old is not None:
                    room[:used] = old[self._first : self._last]
                setattr(self, name, room)
        self._first, self._last = 0, used

    def _read(self, newest: Tensor) -> Tensor:
        """All live tokens, and `newest` behind them."""
        if self._codes is None or self._packed_tokens == 0:
            return newest
        dense = self._dequantize(newest.shape[-1]).permute(1, 2, 0, 3, 4).flatten(2, 3).to(newest.dtype)
        if len(self._dead) == 1 and self._dead[0][0] == 0:
            dense = dense[:, :, self._dead[0][1] :]
        elif self._dead:
            live = torch.ones(dense.shape[2], dtype=torch.bool)
            for start, stop in self._dead:
                live[start:stop] = False
            dense = dense.index_select(2, live.nonzero().flatten().to(dense.device))
        return dense if newest.shape[2] == 0 else torch.cat([dense, newest], dim=2)

    def _dequantize(self, size: int) -> Tensor:
        """float32 [blocks, b, h, rows, d]: in the order of memory, which is several times faster than any other."""
        assert self._codes is not None
        part = slice(self._first, self._last)
        words, bits, format = self._codes[part], self.spec.format.bits, self.spec.format
        # codes of 8 bits are their own packing
        unsigned = words if words.shape[-1] == size and bits == 8 else unpack(words, bits, size)
        codes = (unsigned - format.code_offset).view(format.code_dtype) if format.code_offset else unsigned
        values = format.decode(codes)
        if self._scales is None:
            assert self.scale is not None
            return values.mul_(self.scale.to(values.device))
        tiles = values.unflatten(-1, (self._scales.shape[-1], -1))
        if self._zeros is not None:
            tiles.sub_(self._zeros[part].float()[:, :, :, None, :, None])
        tiles.mul_(self._scales[part].float()[:, :, :, None, :, None])
        return values

    @property
    def _live(self) -> int:
        """Packed tokens that are not dead."""
        return self._packed_tokens - sum(stop - start for start, stop in self._dead)

    def _place(self, number: int) -> int:
        """Where among the packed tokens the live one of this number is."""
        for start, stop in self._dead:
            if start <= number:
                number += stop - start
        return number
