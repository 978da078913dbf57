"""y = x W^T + b with integer weights of 8, 4, 3 or 2 bits and inputs quantized to 8 bits or fewer.

Products are exact integers; scales are applied in float32. The twin is `reference.int_linear`; the layout of the
packed weight is described in native/linear/int_weights.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.native import DTYPES, native
from bitgrain.kernels.packed_linear import BITS, ZEROS, PackedLinear, Zeros, kind_of_zeros, panel_bits
from bitgrain.kernels.words import check_words


@dataclass(frozen=True)
class IntInputs:
    """How inputs become integers: code = round(clamp(x / scale + zero, low, high)), ties to even.

    low, high  of the codes, within -128..127 or 0..255
    divisor    dynamic: a row's scale is its largest magnitude / divisor (127 for symmetric int8)
    scales     static: one scale for each span; None for dynamic ones
    zeros      static: one integer zero point for each span
    """

    low: int = -127
    high: int = 127
    divisor: float = 127.0
    scales: tuple[float, ...] | None = None
    zeros: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (-128 <= self.low <= self.high <= 127 or 0 <= self.low <= self.high <= 255):
            raise KernelError(f"input codes {self.low}..{self.high} do not fit a byte")

    def shift(self, bits: int) -> int:
        """What is added to codes as they are stored: unsigned bytes for 8-bit weights, signed ones for fewer bits."""
        if bits == 8:
            return 128 if self.low < 0 else 0
        return -128 if self.high > 127 else 0


class IntLinear(PackedLinear):
    """W [n, k] packed for the kernels, with its inputs' quantization and a bias.

    Called with x [..., k] it gives [..., n]; a row with NaN or Inf gives one of NaN.
    """

    def __init__(
        self,
        n: int,
        lengths: Sequence[int],
        bits: int,
        inputs: IntInputs,
        *,
        scale_dtype: torch.dtype = torch.float32,
        zeros: Zeros = "constant",
        zero: int = 0,
        bias: Tensor | None = None,
        panels: Tensor | None = None,
    ) -> None:
        """lengths: of the spans, runs of inputs that share a weight scale. Raises KernelError for unknown kinds."""
        if bits not in BITS or scale_dtype not in DTYPES:
            raise KernelError(f"no kernel for {bits}-bit weights with {scale_dtype} scales; bits: {BITS}")
        self.n, self.k, self.lengths, self.bits = n, sum(lengths), tuple(lengths), bits
        self.inputs, self.scale_dtype, self.zeros, self.zero = inputs, scale_dtype, zeros, zero
        shift = inputs.shift(bits)
        sums = shift != 0 or any(inputs.zeros)
        handle = native().IntWeight(n, bits, DTYPES[scale_dtype], ZEROS[zeros], zero, sums, list(lengths))
        given = inputs.scales is not None
        handle.set_inputs(
            given, inputs.divisor, inputs.low, inputs.high, shift, list(inputs.scales or ()), list(inputs.zeros)
        )
        self._hold(handle, panels, bias)

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        bits: int,
        inputs: IntInputs,
        *,
        lengths: Sequence[int] | None = None,
        zero: int | Tensor = 0,
        minimum: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
    ) -> IntLinear:
        """w = scale * (code - zero) - minimum.

        codes    [n, k]: uint8 (int8 for 8 bits)
        scale    [n, spans]: float32, bfloat16 or float16
        zero     one integer for all, or [n, spans]: uint8 codes (in fewer than 8 bits) or floats
        minimum  None, or [n, spans] beside one zero point for all; kept in the scales' dtype
        lengths  of the spans; None: all equal
        Raises KernelError for shapes that do not fit.
        """
        made = cls._for(codes.shape[0], codes.shape[1], scale, bits, inputs, lengths, zero, minimum, scale_dtype, bias)
        made._fill(codes, scale.to(torch.float32), minimum if isinstance(zero, int) else zero)
        return made

    @classmethod
    def pack_words(
        cls,
        words: Tensor,
        scale: Tensor,
        bits: int,
        inputs: IntInputs,
        *,
        k: int,
        lengths: Sequence[int] | None = None,
        zero: int | Tensor | None = None,
        minimum: Tensor | None = None,
        scale_dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
    ) -> IntLinear:
        """w = scale * (code - zero) - minimum, straight from densely packed rows, of which 32 are unpacked at a time.

        words    [n, ...], uint8 or int32: rows of unsigned codes as `numerics.packing.pack` has them (and the formats
                 pack-quantized of compressed-tensors)
        bits     of one code in `words`, 1 to 8; the panels have 2, 3, 4 or 8 (`panel_bits`)
        k        codes of a row
        zero     what the unsigned code of a 0 is: None for signed codes stored as code + 2**(bits - 1); or as of `pack`
        The others as of `pack`. Raises KernelError for shapes that do not fit.
        """
        stride = check_words(words, bits, k)
        runs = [k // scale.shape[1]] * scale.shape[1] if lengths is None else lengths
        wide = panel_bits(bits, runs)
        point: int | Tensor = 1 << (bits - 1) if zero is None else zero
        if wide == 8:  # these panels are signed
            half = 1 << (bits - 1)
            point = point - half if isinstance(point, int) else point.to(torch.float32) - half
        made = cls._for(words.shape[0], k, scale, wide, inputs, lengths, point, minimum, scale_dtype, bias)
        more = minimum if isinstance(point, int) else point
        made._fill_from_words(words, stride, bits, scale.to(torch.float32), more)
        return made

    @classmethod
    def _for(
        cls,
        n: int,
        k: int,
        scale: Tensor,
        bits: int,
        inputs: IntInputs,
        lengths: Sequence[int] | None,
        zero: int | Tensor,
        minimum: Tensor | None,
        scale_dtype: torch.dtype | None,
        bias: Tensor | None,
    ) -> IntLinear:
        """With panels that are not filled yet."""
        spans = scale.shape[1]
        lengths = [k // spans] * spans if lengths is None else lengths
        kind = kind_of_zeros(scale, zero, minimum)
        made = cls(
            n, lengths, bits, inputs, scale_dtype=scale_dtype or scale.dtype, zeros=kind,
            zero=zero if isinstance(zero, int) else 0, bias=bias,
        )  # fmt: skip
        if made.k != k or scale.shape != (n, len(lengths)):
            raise KernelError(f"codes {(n, k)} and scales {tuple(scale.shape)} do not fit spans {list(lengths)}")
        return made

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """codes [n, k], scale [n, spans] float32, zero points or minima [n, spans] (None without), as packed."""
        return self._read(len(self.lengths), torch.float32)

    def dequantize_features(self, index: Tensor) -> Tensor:
        """Columns of the weight, dequantized: float32 [len(index), n]; index int64, each from 0 to k - 1."""
        found = torch.empty(len(index), self.n)
        self.handle.dequantize(index.data_ptr(), len(index), found.data_ptr(), torch.get_num_threads())
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.scale_dtype, self.zeros, self.zero, self.bias, self.panels)
        return _restore, (self.n, self.lengths, self.bits, self.inputs, *settings)


def _restore(
    n: int, lengths: Sequence[int], bits: int, inputs: IntInputs, scale_dtype: torch.dtype, zeros: Zeros, zero: int,
    bias: Tensor | None, panels: Tensor,
) -> IntLinear:  # fmt: skip
    return IntLinear(
        n, lengths, bits, inputs, scale_dtype=scale_dtype, zeros=zeros, zero=zero, bias=bias, panels=panels
    )
