"""y = x W^T + b with weights of 2, 3 or 4 bits that are looked up in a table of up to 16 numbers, or of 8-bit integers;
inputs are not quantized.

Two arithmetics, by level (`native.isa()`); `rounds_inputs()` says which one runs:

- avx512bf16: inputs and the table's numbers are rounded to bfloat16, products are exact, sums are float32. Integers of
  up to 8 bits and E2M1 are bfloat16 numbers; NF4's are not (relative error of each: up to 2^-9).
- avx512vnni, avxvnni, avx2, neon, portable: float32 throughout, inputs as they are.

Scales, zero points and bias are applied in float32 at every level. The twin is `reference.code_linear`; the layout of
the packed weight is described in native/linear/code_weights.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.int_linear import BITS, Zeros
from bitgrain.kernels.native import DTYPES, native, panel_memory, rows_of
from bitgrain.kernels.words import check_words

SCALE_DTYPES = {**DTYPES, torch.float8_e8m0fnu: 6, torch.float8_e4m3fn: 7}
_ZEROS: dict[Zeros, int] = {"constant": 0, "codes": 1, "real": 2}


def rounds_inputs() -> bool:
    """Whether the level that runs rounds inputs and tables to bfloat16."""
    return native().rounds_inputs()


class CodeLinear:
    """W [n, k] packed for the kernels, with a bias.

    panels  uint8, as `pack` lays them out; the same for every instruction set
    """

    def __init__(
        self,
        n: int,
        k: int,
        bits: int,
        table: Sequence[float] | None,
        *,
        group: int | None = None,
        scale_dtype: torch.dtype = torch.float32,
        zeros: Zeros = "constant",
        outer: float = 1.0,
        bias: Tensor | None = None,
        panels: Tensor | None = None,
    ) -> None:
        """Arguments as of `pack`. Raises KernelError for kinds that no kernel has."""
        if bits not in BITS or scale_dtype not in SCALE_DTYPES:
            raise KernelError(f"no kernel for {bits}-bit weights with {scale_dtype} scales; bits: {BITS}")
        if (table is None) != (bits == 8) or (table is not None and not 1 <= len(table) <= 2**bits):
            size = "none" if table is None else len(table)
            raise KernelError(f"codes of {bits} bits and a table of {size}: 2**bits numbers or fewer; 8 bits: none")
        self.n, self.k, self.bits, self.group = n, k, bits, group or k
        self.table = None if table is None else tuple(float(number) for number in table)
        self.scale_dtype, self.zeros, self.outer = scale_dtype, zeros, outer
        self.handle: Any = native().CodeWeight(
            n, k, self.group, bits, list(self.table or ()), SCALE_DTYPES[scale_dtype], _ZEROS[zeros], outer
        )
        self.panels = panel_memory(self.handle.nbytes()) if panels is None else panels
        self._run = self.handle.run
        self.set_bias(bias)

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        table: Sequence[float] | None,
        *,
        group: int | None = None,
        zero: Tensor | None = None,
        outer: float = 1.0,
        bias: Tensor | None = None,
    ) -> CodeLinear:
        """w = (table[code] - zero) * scale * outer; for 8 bits (code - zero) * scale * outer.

        codes  [n, k]: uint8 (int8 for 8 bits)
        scale  [n, ceil(k / group)]: float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn, kept as they are
        table  up to 2**bits numbers; None for 8 bits
        group  inputs that share a scale; the last group of a row may be shorter; None: one for the row
        zero   None, or shaped as scale: uint8 codes or floats. What is one number for all belongs into the table.
        outer  one more scale for all (NVFP4)
        Raises KernelError for shapes that do not fit.
        """
        made = cls._for(codes.shape[0], codes.shape[1], scale, bits, table, group, zero, outer, bias)
        codes, scale = codes.contiguous(), scale.contiguous()
        zeros = None if zero is None else zero.to(torch.float32).contiguous()
        made.handle.pack(
            codes.data_ptr(), scale.data_ptr(), 0 if zeros is None else zeros.data_ptr(), made.panels.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return made

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
        bias: Tensor | None = None,
    ) -> CodeLinear:
        """The same from densely packed rows: no more is unpacked than a panel of 32 rows.

        words  [n, ...], uint8 or int32: rows of unsigned codes as `numerics.packing.pack` has them (and the formats
               pack-quantized, nvfp4- and mxfp4-pack-quantized of compressed-tensors)
        bits   of one code in `words`, 1 to 8. Up to 4 bits index the table; 5 to 8 bits are signed integers stored as
               code + 2**(bits - 1), in panels of 8 bits
        k      codes of a row
        Raises KernelError for shapes that do not fit.
        """
        stride = check_words(words, bits, k)
        wide = min(b for b in BITS if b >= bits)
        made = cls._for(words.shape[0], k, scale, wide, table, group, zero, outer, bias)
        scale = scale.contiguous()
        zeros = None if zero is None else zero.to(torch.float32).contiguous()
        made.handle.pack_words(
            words.data_ptr(), stride, bits, scale.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
            made.panels.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return made

    @classmethod
    def _for(
        cls,
        n: int,
        k: int,
        scale: Tensor,
        bits: int,
        table: Sequence[float] | None,
        group: int | None,
        zero: Tensor | None,
        outer: float,
        bias: Tensor | None,
    ) -> CodeLinear:
        """With panels that are not filled yet."""
        kind: Zeros = "constant" if zero is None else "codes" if zero.dtype == torch.uint8 else "real"
        if scale.shape != (n, -(-k // (group or k))) or (zero is not None and zero.shape != scale.shape):
            shapes = f"{tuple(scale.shape)} beside zero points {None if zero is None else tuple(zero.shape)}"
            raise KernelError(f"scales {shapes} do not fit codes {(n, k)} in groups of {group or k}")
        return cls(n, k, bits, table, group=group, scale_dtype=scale.dtype, zeros=kind, outer=outer, bias=bias)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes [n, k], scale and zero points [n, groups] (None if there are none), as they were packed."""
        shape = (self.n, -(-self.k // self.group))
        codes = torch.empty(self.n, self.k, dtype=torch.int8 if self.bits == 8 else torch.uint8)
        scale = torch.empty(shape, dtype=self.scale_dtype)
        zero = None if self.zeros == "constant" else torch.empty(shape)
        self.handle.unpack(
            codes.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(), torch.get_num_threads()
        )
        return codes, scale, zero.to(torch.uint8) if zero is not None and self.zeros == "codes" else zero

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
        self.handle.attach(self.panels.data_ptr(), 0 if self.bias is None else self.bias.data_ptr())

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.scale_dtype, self.zeros, self.outer, self.bias, self.panels)
        return _restore, (self.n, self.k, self.bits, self.table, self.group, *settings)


def _restore(
    n: int, k: int, bits: int, table: Sequence[float] | None, group: int, scale_dtype: torch.dtype, zeros: Zeros,
    outer: float, bias: Tensor | None, panels: Tensor,
) -> CodeLinear:  # fmt: skip
    return CodeLinear(
        n, k, bits, table, group=group, scale_dtype=scale_dtype, zeros=zeros, outer=outer, bias=bias, panels=panels
    )
