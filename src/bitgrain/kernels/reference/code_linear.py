"""The twin of `kernels.code_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.code_linear import CodeTable
from bitgrain.kernels.float_inputs import FloatInputs
from bitgrain.kernels.native import rows_of
from bitgrain.kernels.reference.embedding import look_up
from bitgrain.kernels.reference.float_inputs import round_inputs
from bitgrain.kernels.words import unpack_words


def dequantize(
    codes: Tensor,
    scale: Tensor,
    table: CodeTable,
    *,
    group: int | None = None,
    zero: Tensor | float | None = None,
    minimum: Tensor | None = None,
    outer: float = 1.0,
    rounded: bool = False,
) -> Tensor:
    """The weight [n, k] in float64; arguments as of `CodeLinear.pack`. rounded: the table is rounded to bfloat16."""
    k = codes.shape[1]
    if isinstance(table, torch.dtype):
        numbers = codes.view(table).double()
    elif table is None:
        numbers = codes.double()
    else:
        entries = torch.tensor(list(table), dtype=torch.float32)
        numbers = (entries.bfloat16() if rounded else entries).double()[codes.long()]

    def spread(x: Tensor) -> Tensor:
        return x.to(torch.float32).double().repeat_interleave(group or k, 1)[:, :k]

    if zero is not None:
        numbers = numbers - (spread(zero) if isinstance(zero, Tensor) else zero)
    scaled = numbers * spread(scale)
    return (scaled if minimum is None else scaled - spread(minimum)) * outer


def code_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    table: CodeTable,
    *,
    group: int | None = None,
    zero: Tensor | float | None = None,
    minimum: Tensor | None = None,
    outer: float = 1.0,
    bias: Tensor | None = None,
    inputs: FloatInputs | None = None,
    rounded: bool = False,
) -> Tensor:
    """Arguments as of `CodeLinear.pack`, x [m, k]; computed in float64 and rounded once to the dtype of x.

    rounded  inputs and table are rounded to bfloat16, as the levels avx512bf16 and amx do; that changes no FP8 or FP4
    The kernel's distance: |y - twin| <= (group + groups + 8) 2^-24 sum_k |x| ((|table| + |zero|) |scale| + |minimum|),
    and one rounding to its dtype. Minima are taken off as they are, times the sum of a group's inputs: no division by a
    scale, which may be 0. With 1 or 2 rows avx512bf16 multiplies 8-bit codes in two parts: 512 stands for the table.
    """
    weight = dequantize(codes, scale, table, group=group, zero=zero, minimum=minimum, outer=outer, rounded=rounded)
    if inputs is not None:
        values, steps = round_inputs(x, inputs, group)
        seen = values.double() * steps
    else:
        seen = (x.bfloat16() if rounded else x).double()
    y = seen @ weight.T
    return (y if bias is None else y + bias.double()).to(x.dtype)


class CodeLinearTwin:
    """`CodeLinear` without the native module: the same face; panels are the unsigned codes [n, k]."""

    def __init__(
        self, codes: Tensor, scale: Tensor, table: CodeTable, group: int | None, zero: Tensor | float | None,
        minimum: Tensor | None, outer: float, inputs: FloatInputs | None,
    ) -> None:  # fmt: skip
        self.panels, self.scale, self.table, self.group, self.zero, self.outer = codes, scale, table, group, zero, outer
        self.minimum, self.inputs = minimum, inputs
        self.bias: Tensor | None = None

    @classmethod
    def pack_words(
        cls,
        words: Tensor,
        scale: Tensor,
        bits: int,
        table: CodeTable,
        *,
        k: int,
        group: int | None = None,
        zero: Tensor | float | None = None,
        minimum: Tensor | None = None,
        outer: float = 1.0,
        inputs: FloatInputs | None = None,
    ) -> CodeLinearTwin:
        """See `CodeLinear.pack_words`."""
        numbers = [float(code - 2 ** (bits - 1)) for code in range(2**bits)] if table is None else table
        return cls(unpack_words(words, bits, k), scale, numbers, group, zero, minimum, outer, inputs)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `CodeLinear.unpack`."""
        return self.panels, self.scale, self.zero if isinstance(self.zero, Tensor) else self.minimum

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `PackedLinear.rows`."""
        assert self.table is not None  # `pack_words` says what integers are
        return look_up(
            self.panels, self.scale, self.table, ids, dtype, group=self.group, zero=self.zero, minimum=self.minimum,
            outer=self.outer,
        )  # fmt: skip

    def set_bias(self, bias: Tensor | None) -> None:
        """See `CodeLinear.set_bias`."""
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        """See `CodeLinear`; inputs are not rounded to bfloat16."""
        rows = rows_of(x, self.panels.shape[1])
        y = code_linear(
            rows,
            self.panels,
            self.scale,
            self.table,
            group=self.group,
            zero=self.zero,
            minimum=self.minimum,
            outer=self.outer,
            bias=self.bias,
            inputs=self.inputs,
        )
        return y.view(*x.shape[:-1], -1)
