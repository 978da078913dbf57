"""y = x W^T + b with weights of 2, 3 or 4 bits that are looked up in a table of up to 16 numbers, of 8-bit integers or
of FP8; inputs as they are, or rounded to FP8 or FP4.

Two arithmetics, by level (`native.isa()`) and rows; `rounds_inputs()` says which one runs:

- avx512bf16, and amx from 4 rows on: inputs and the table's numbers are rounded to bfloat16, products are exact, sums
  are float32. Integers of up to 8 bits, FP8 and E2M1 are bfloat16 numbers; NF4's are not (relative error of each: up to
  2^-9).
- amx for fewer rows, avx512vnni, avxvnni, avx2, neon, portable: float32 throughout, inputs as they are.

Scales, zero points and bias are applied in float32 at every level. Inputs that are rounded to FP8 or FP4 are multiplied
as numbers of that format, and the sums by the inputs' scale: the arithmetic of FP8 hardware. The twin is
`reference.code_linear`; the layout of the packed weight is described in native/linear/code_weights.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.float_inputs import FloatInputs
from bitgrain.kernels.native import DTYPES, native
from bitgrain.kernels.packed_linear import BITS, ZEROS, PackedLinear, Zeros, kind_of_zeros, panel_bits
from bitgrain.kernels.words import check_words

CodeTable = Sequence[float] | torch.dtype | None
"""What codes mean: up to 2**bits numbers; for codes of 8 bits float8_e4m3fn, float8_e5m2 or None, which is integers."""
FLOAT8 = {torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}
"""What codes of 8 bits may be beside integers, as native/linear/code_weights.h numbers it."""
SCALE_DTYPES = {**DTYPES, torch.float8_e8m0fnu: 6, torch.float8_e4m3fn: 7}


def rounds_inputs(rows: int) -> bool:
    """Whether the level that runs rounds so many rows of inputs, and tables, to bfloat16."""
    return native().rounds_inputs(rows)


class CodeLinear(PackedLinear):
    """W [n, k] packed for the kernels, with a bias. Called with x [..., k] it gives [..., n]."""

    def __init__(
        self,
        n: int,
        k: int,
        bits: int,
        table: CodeTable,
        *,
        group: int | None = None,
        scale_dtype: torch.dtype = torch.float32,
        zeros: Zeros = "constant",
        zero: float = 0.0,
        outer: float = 1.0,
        bias: Tensor | None = None,
        panels: Tensor | None = None,
        inputs: FloatInputs | None = None,
    ) -> None:
        """Arguments as of `pack`. Raises KernelError for kinds that no kernel has."""
        if bits not in BITS or scale_dtype not in SCALE_DTYPES:
            raise KernelError(f"no kernel for {bits}-bit weights with {scale_dtype} scales; bits: {BITS}")
        kind = _kind(bits, table)
        self.n, self.k, self.bits, self.group = n, k, bits, group or k
        self.table = tuple(float(number) for number in table) if isinstance(table, Sequence) else table
        self.scale_dtype, self.zeros, self.zero, self.outer, self.inputs = scale_dtype, zeros, zero, outer, inputs
        numbers = list(self.table) if isinstance(self.table, tuple) else []
        handle = native().CodeWeight(
            n, k, self.group, bits, kind, numbers, SCALE_DTYPES[scale_dtype], ZEROS[zeros], zero, outer
        )
        if inputs is not None:
            handle.round_inputs(*inputs.arguments())
        self._hold(handle, panels, bias)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 and self.table is None else torch.uint8

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        table: CodeTable,
        *,
        group: int | None = None,
        zero: Tensor | float | None = None,
        minimum: Tensor | None = None,
        outer: float = 1.0,
        bias: Tensor | None = None,
        inputs: FloatInputs | None = None,
    ) -> CodeLinear:
        """w = ((table[code] - zero) * scale - minimum) * outer; for integers of 8 bits the code stands for table[code].

        codes  [n, k]: uint8 (int8 for integers of 8 bits)
        scale  [n, ceil(k / group)]: float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn, kept as they are
        table  what codes mean, see CodeTable
        group  inputs that share a scale; the last group of a row may be shorter; None: one for the row
        zero   None, or shaped as scale: uint8 codes or floats. What is one number for all belongs into the table
               (beside minima it may be here)
        minimum  None, or shaped as scale: floats, which are kept in the scales' dtype (float32, bfloat16 or float16)
        outer  one more scale for all (NVFP4)
        inputs how x is rounded before it is multiplied; None: not
        Raises KernelError for shapes that do not fit.
        """
        made = cls._for(codes.shape[0], codes.shape[1], scale, bits, table, group, zero, minimum, outer, bias, inputs)
        made._fill(codes, scale, zero if isinstance(zero, Tensor) else minimum)
        return made

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
        bias: Tensor | None = None,
        inputs: FloatInputs | None = None,
    ) -> CodeLinear:
        """The same from densely packed rows: no more is unpacked than a panel of 32 rows.

        words  [n, ...], uint8 or int32: rows of unsigned codes as `numerics.packing.pack` has them (and the formats
               pack-quantized, nvfp4- and mxfp4-pack-quantized of compressed-tensors)
        bits   of one code in `words`, 1 to 8. Up to 4 bits index the table; without one, 5 to 8 bits are signed
               integers stored as code + 2**(bits - 1), in panels of 8 bits
        k      codes of a row
        Raises KernelError for shapes that do not fit.
        """
        stride = check_words(words, bits, k)
        run = group or k
        wide = panel_bits(bits, [run] * (k // run) + [k % run])
        made = cls._for(words.shape[0], k, scale, wide, table, group, zero, minimum, outer, bias, inputs)
        made._fill_from_words(words, stride, bits, scale, zero if isinstance(zero, Tensor) else minimum)
        return made

    @classmethod
    def _for(
        cls,
        n: int,
        k: int,
        scale: Tensor,
        bits: int,
        table: CodeTable,
        group: int | None,
        zero: Tensor | float | None,
        minimum: Tensor | None,
        outer: float,
        bias: Tensor | None,
        inputs: FloatInputs | None,
    ) -> CodeLinear:
        """With panels that are not filled yet."""
        if scale.shape != (n, -(-k // (group or k))):
            raise KernelError(f"scales {tuple(scale.shape)} do not fit codes {(n, k)} in groups of {group or k}")
        kind, constant = kind_of_zeros(scale, zero, minimum), 0.0 if isinstance(zero, Tensor) else float(zero or 0)
        return cls(
            n, k, bits, table, group=group, scale_dtype=scale.dtype, zeros=kind, zero=constant, outer=outer, bias=bias,
            inputs=inputs,
        )  # fmt: skip

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes [n, k], scale and zero points or minima [n, groups] (None without), as they were packed."""
        return self._read(-(-self.k // self.group), self.scale_dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.scale_dtype, self.zeros, self.zero, self.outer, self.bias, self.panels, self.inputs)
        return _restore, (self.n, self.k, self.bits, self.table, self.group, *settings)


def _kind(bits: int, table: CodeTable) -> int:
    """What codes are, as native/linear/code_weights.h numbers it. Raises KernelError where bits do not fit."""
    if table is None or isinstance(table, torch.dtype):
        if bits == 8 and (table is None or table in FLOAT8):
            return 1 if table is None else FLOAT8[table]
    elif bits < 8 and 1 <= len(table) <= 2**bits:
        return 0
    given = "none" if table is None else str(table) if isinstance(table, torch.dtype) else str(len(table))
    raise KernelError(
        f"codes of {bits} bits and a table of {given}: 2**bits numbers or fewer; 8 bits: none, or one of "
        f"{', '.join(map(str, FLOAT8))}"
    )


def _restore(
    n: int,
    k: int,
    bits: int,
    table: CodeTable,
    group: int,
    scale_dtype: torch.dtype,
    zeros: Zeros,
    zero: float,
    outer: float,
    bias: Tensor | None,
    panels: Tensor,
    inputs: FloatInputs | None,
) -> CodeLinear:
    return CodeLinear(
        n, k, bits, table, group=group, scale_dtype=scale_dtype, zeros=zeros, zero=zero, outer=outer, bias=bias,
        panels=panels, inputs=inputs,
    )  # fmt: skip
