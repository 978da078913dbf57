"""The twin of `kernels.int_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.int_linear import IntInputs
from bitgrain.kernels.native import rows_of
from bitgrain.kernels.words import unpack_words


def quantize_inputs(x: Tensor, inputs: IntInputs, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k] -> codes without their zero points [m, k] float64, scales of the rows [m, 1] and of the columns [k]."""
    x = x.to(torch.float32)
    if inputs.scales is None:
        largest = x.abs().amax(1, keepdim=True)
        row = torch.where(largest > 0, largest / inputs.divisor, torch.ones_like(largest))
        column, zero, step = torch.ones(x.shape[1]), torch.zeros(x.shape[1]), row
    else:
        row = torch.ones(x.shape[0], 1)
        sizes = torch.tensor(list(lengths))
        column = torch.tensor(inputs.scales).repeat_interleave(sizes)
        zero = torch.tensor(inputs.zeros, dtype=torch.float32).repeat_interleave(sizes)
        step = column
    codes = (x / step + zero).clamp(inputs.low, inputs.high).round()
    finite = x.isfinite().all(1, keepdim=True)
    return (codes - zero).double(), torch.where(finite, row, torch.nan), column


def int_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    inputs: IntInputs,
    *,
    lengths: Sequence[int],
    zero: int | Tensor = 0,
    minimum: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Arguments as of `IntLinear.pack`, x [m, k]; computed in float64 and rounded once to the dtype of x.

    The kernel's distance: |y - twin| <= (spans + 4) 2^-23 sum_k |x q| ((|code| + |zero|) |scale| + |minimum|), and one
    rounding to its dtype.
    """
    sizes = torch.tensor(list(lengths))
    shift = zero if isinstance(zero, int) else zero.double().repeat_interleave(sizes, 1)
    weight = (codes.double() - shift) * scale.double().repeat_interleave(sizes, 1)
    if minimum is not None:
        weight -= minimum.double().repeat_interleave(sizes, 1)
    q, row, column = quantize_inputs(x, inputs, lengths)
    y = (q * column.double()) @ weight.T * row.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


class IntLinearTwin:
    """`IntLinear` without the native module: the same face; panels are the unsigned codes [n, k]."""

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: int | Tensor, minimum: Tensor | None, lengths: tuple[int, ...],
        inputs: IntInputs,
    ) -> None:  # fmt: skip
        self.scale, self.zero, self.minimum, self.lengths, self.inputs = scale, zero, minimum, lengths, inputs
        self.panels = codes
        self.bias: Tensor | None = None

    @classmethod
    def pack_words(
        cls,
        words: Tensor,
        scale: Tensor,
        bits: int,
        inputs: IntInputs,
        *,
        k: int,
        lengths: Sequence[int],
        zero: int | Tensor = 0,
        minimum: Tensor | None = None,
    ) -> IntLinearTwin:
        """See `IntLinear.pack_words`."""
        return cls(unpack_words(words, bits, k), scale, zero, minimum, tuple(lengths), inputs)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `IntLinear.unpack`."""
        return self.panels, self.scale.to(torch.float32), self.minimum if isinstance(self.zero, int) else self.zero

    def dequantize_features(self, index: Tensor) -> Tensor:
        """See `IntLinear.dequantize_features`."""
        span = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))[index]
        zero = self.zero if isinstance(self.zero, int) else self.zero[:, span].to(torch.float32)
        found = (self.panels[:, index].to(torch.float32) - zero) * self.scale[:, span].to(torch.float32)
        return (found if self.minimum is None else found - self.minimum[:, span].to(torch.float32)).T

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `PackedLinear.rows`."""
        sizes = torch.tensor(self.lengths)

        def spread(x: Tensor) -> Tensor:
            return x[ids].to(torch.float32).repeat_interleave(sizes, -1)

        zero = self.zero if isinstance(self.zero, int) else spread(self.zero)
        found = (self.panels[ids].to(torch.float32) - zero) * spread(self.scale)
        return (found if self.minimum is None else found - spread(self.minimum)).to(dtype)

    def set_bias(self, bias: Tensor | None) -> None:
        """See `IntLinear.set_bias`."""
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        """See `IntLinear`."""
        rows = rows_of(x, self.panels.shape[1])
        y = int_linear(
            rows, self.panels, self.scale, self.inputs, lengths=self.lengths, zero=self.zero, minimum=self.minimum,
            bias=self.bias,
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)
