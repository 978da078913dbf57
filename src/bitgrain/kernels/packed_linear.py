"""What packed weights share, whatever their panels hold: how they are filled, read back and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.memory import weight_memory
from bitgrain.kernels.native import DTYPES, address_of, rows_of

Zeros = Literal["constant", "codes", "real", "minima"]
ZEROS: dict[Zeros, int] = {"constant": 0, "codes": 1, "real": 2, "minima": 3}
"""Kinds of zero points, as native/linear/int_weights.h numbers them."""
BITS = (2, 3, 4, 8)
"""Of codes in panels."""
_CHUNKS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}
"""Features of a chunk and its vectors, see native/linear/int_weights.h."""


class PackedLinear:
    """W [n, k] packed for the kernels, with a bias.

    handle  of the native module
    panels  uint8, as its `pack` lays them out; the same for every instruction set
    """

    n: int
    k: int
    bits: int
    zeros: Zeros

    def _hold(self, handle: Any, panels: Tensor | None, bias: Tensor | None) -> None:
        """To be called once n, k, bits and zeros are there; panels None: memory for them."""
        self.handle = handle
        self.panels = weight_memory(handle.nbytes()) if panels is None else panels
        self._run = handle.run
        self.set_bias(bias)

    def _fill(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Panels from codes [n, k]; scales in the dtype that the handle takes."""
        codes, scale, zeros = codes.contiguous(), scale.contiguous(), _floats(zero)
        self.handle.pack(
            codes.data_ptr(), scale.data_ptr(), address_of(zeros), self.panels.data_ptr(), torch.get_num_threads()
        )

    def _fill_from_words(self, words: Tensor, stride: int, bits: int, scale: Tensor, zero: Tensor | None) -> None:
        """Panels from densely packed rows, `stride` bytes each."""
        scale, zeros = scale.contiguous(), _floats(zero)
        self.handle.pack_words(
            words.data_ptr(), stride, bits, scale.data_ptr(), address_of(zeros), self.panels.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    @property
    def code_dtype(self) -> torch.dtype:
        """Of codes, as they are packed and unpacked."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def _read(self, spans: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes [n, k], scale and zero points or minima [n, spans] (None without), as they were packed."""
        codes = torch.empty(self.n, self.k, dtype=self.code_dtype)
        scale = torch.empty(self.n, spans, dtype=scale_dtype)
        zero = None if self.zeros == "constant" else torch.empty(self.n, spans)
        self.handle.unpack(codes.data_ptr(), scale.data_ptr(), address_of(zero), torch.get_num_threads())
        return codes, scale, zero.to(torch.uint8) if zero is not None and self.zeros == "codes" else zero

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of W, for ids [...] integers: [..., k] in float32, bfloat16 or float16, each step rounded to float32,
        then to `dtype`. Raises KernelError for unknown ids."""
        return gather_rows(self.handle.gather, ids, self.n, self.k, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., k] float32, bfloat16 or float16 -> [..., n] in its dtype."""
        shape, kind = x.shape, DTYPES.get(x.dtype)
        if kind is None or shape[-1] != self.k or not x.is_cpu:
            rows_of(x, self.k)  # says what is wrong
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*shape[:-1], self.n))
        self._run(x.data_ptr(), kind, x.numel() // self.k, self.k, y.data_ptr(), kind, self.n, torch.get_num_threads())
        return y

    def set_bias(self, bias: Tensor | None) -> None:
        """Another bias [n] from now on. Also to be called when the memory of `panels` has moved."""
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self.handle.attach(self.panels.data_ptr(), address_of(self.bias))


def gather_rows(run: Callable[..., int], ids: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """ids [...] -> rows [..., k] by a native look-up, which tells the first id that is no row of n."""
    if dtype not in DTYPES:
        raise KernelError(f"rows are given in float32, bfloat16 or float16, not {dtype}")
    wanted = ids.to(torch.int64).contiguous()
    y = torch.empty((*ids.shape, k), dtype=dtype)
    bad = run(wanted.data_ptr(), wanted.numel(), y.data_ptr(), DTYPES[dtype], torch.get_num_threads())
    if bad >= 0:
        raise KernelError(f"{int(wanted.view(-1)[bad])} is no row of an embedding of {n}")
    return y


def panel_bits(bits: int, lengths: Iterable[int]) -> int:
    """Of the panels that take the least for codes of `bits` bits in runs of these lengths, which are padded to whole
    chunks: 3 bits in groups of 16 lie closer in 4."""

    def size(wide: int) -> int:
        return sum(-(-length // _CHUNKS[wide][0]) * _CHUNKS[wide][1] for length in lengths)

    lengths = list(lengths)
    return min((wide for wide in BITS if wide >= bits and (wide < 8 or bits > 4)), key=lambda wide: (size(wide), wide))


def kind_of_zeros(scale: Tensor, zero: Tensor | float | None, minimum: Tensor | None) -> Zeros:
    """How panels hold them. Raises KernelError for shapes and dtypes that do not fit the scales."""
    if minimum is not None:
        if isinstance(zero, Tensor) or minimum.shape != scale.shape or scale.dtype not in DTYPES:
            raise KernelError(
                f"minima {tuple(minimum.shape)} take scales of that shape in float32, bfloat16 or float16, and one "
                f"zero point for all: not {tuple(scale.shape)} {scale.dtype}"
            )
        return "minima"
    if not isinstance(zero, Tensor):
        return "constant"
    if zero.shape != scale.shape:
        raise KernelError(f"zero points {tuple(zero.shape)} do not fit scales {tuple(scale.shape)}")
    return "codes" if zero.dtype == torch.uint8 else "real"


def _floats(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero.to(torch.float32).contiguous()
