"""The twin of `kernels.code_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.native import rows_of
from bitgrain.kernels.reference.embedding import look_up
from bitgrain.kernels.words import unpack_words


def dequantize(
    codes: Tensor,
    scale: Tensor,
    table: Sequence[float] | None,
    *,
    group: int | None = None,
    zero: Tensor | None = None,
    outer: float = 1.0,
    rounded: bool = False,
) -> Tensor:
    """The weight [n, k] in float64; arguments as of `CodeLinear.pack`. rounded: the table is rounded to bfloat16."""
    k = codes.shape[1]
    numbers = codes.double()
    if table is not None:
        entries = torch.tensor(list(table), dtype=torch.float32)
        numbers = (entries.bfloat16() if rounded else entries).double()[codes.long()]

    def spread(x: Tensor) -> Tensor:
        return x.to(torch.float32).double().repeat_interleave(group or k, 1)[:, :k]

    return (numbers if zero is None else numbers - spread(zero)) * spread(scale) * outer


def code_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: Sequence[float] | None,
    *,
    group: int | None = None,
    zero: Tensor | None = None,
    outer: float = 1.0,
    bias: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """Arguments as of `CodeLinear.pack`, x [m, k]; computed in float64 and rounded once to the dtype of x.

    rounded  inputs and table are rounded to bfloat16, as the level avx512bf16 does
    The kernel's distance: |y - twin| <= (group + groups + 8) 2^-24 sum_k |x| (|table| + |zero|) |scale|, and one
    rounding to its dtype. With 1 or 2 rows avx512bf16 multiplies 8-bit codes in two parts: 512 stands for the table.
    """
    weight = dequantize(codes, scale, table, group=group, zero=zero, outer=outer, rounded=rounded)
    y = (x.bfloat16() if rounded else x).double() @ weight.T
    return (y if bias is None else y + bias.double()).to(x.dtype)


class CodeLinearTwin:
    """`CodeLinear` without the native module: the same face; panels are the unsigned codes [n, k]."""

    def __init__(
        self, codes: Tensor, scale: Tensor, table: list[float], group: int | None, zero: Tensor | None, outer: float
    ) -> None:
        self.panels, self.scale, self.table, self.group, self.zero, self.outer = codes, scale, table, group, zero, outer
        self.bias: Tensor | None = None

    @classmethod
    def pack_words(
        cls,
        words: Tensor,
        scale: Tensor,
        bits: int,
        table: Sequence[float] | None,
        *,
        k: int,
        group: int | None = None,
        zero: Tensor | None = None,
        outer: float = 1.0,
    ) -> CodeLinearTwin:
        """See `CodeLinear.pack_words`."""
        numbers = list(table or (float(code - 2 ** (bits - 1)) for code in range(2**bits)))
        return cls(unpack_words(words, bits, k), scale, numbers, group, zero, outer)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `CodeLinear.unpack`."""
        return self.panels, self.scale, self.zero

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `PackedLinear.rows`."""
        return look_up(
            self.panels, self.scale, self.table, ids, dtype, group=self.group, zero=self.zero, outer=self.outer
        )

    def set_bias(self, bias: Tensor | None) -> None:
        """See `CodeLinear.set_bias`."""
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        """See `CodeLinear`; inputs are not rounded."""
        rows = rows_of(x, self.panels.shape[1])
        y = code_linear(
            rows,
            self.panels,
            self.scale,
            self.table,
            group=self.group,
            zero=self.zero,
            outer=self.outer,
            bias=self.bias,
        )
        return y.view(*x.shape[:-1], -1)
