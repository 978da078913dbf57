"""Number formats as values: the grid of numbers that a code can mean. Nothing is tabulated: grid, range and
bits are derived.

Three families cover the field:

- `IntFormat(bits, signed)`: two's complement or unsigned integers, 1 to 16 bits;
- `FloatFormat(exponent_bits, mantissa_bits, ...)`: OCP FP8 E4M3/E5M2 [1], OCP MX FP4 E2M1 and E8M0 [2], IEEE
  half, single and bfloat16 (as the storage of scales);
- `CodebookFormat(name, values)`: any sorted list of numbers; NF4 [3], ternary and binary are such lists.

A format maps numbers to codes and back on whole tensors at once (`round`, `encode`, `decode`), so that a later
format whose codes do not decode one by one (vector codebooks, trellises) is one more class here.

[1] OCP 8-bit Floating Point Specification 1.0. [2] OCP Microscaling Formats Specification 1.0.
[3] Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.dynamic_code import dynamic_values


class Format(ABC):
    """A grid of representable numbers. Subclasses are frozen dataclasses: equal by value, usable as keys."""

    name: str
    bits: int
    """Bits that one code takes when packed densely."""

    @property
    @abstractmethod
    def minimum(self) -> float:
        """The smallest representable number."""

    @property
    @abstractmethod
    def maximum(self) -> float:
        """The largest representable number."""

    @property
    @abstractmethod
    def overflow(self) -> float:
        """The magnitude from which a number would round past `maximum` if the grid went on (maximum + half a step)."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The integer dtype that holds one code."""

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """The nearest representable number for each element of `x` (float32), saturating; ties as the class says."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Codes (`code_dtype`) of numbers that are on the grid already."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Numbers (float32) that the codes mean."""

    def to_codes(self, x: Tensor) -> Tensor:
        """`encode(round(x))`; formats that know a shorter way take it."""
        return self.encode(self.round(x))

    @property
    @abstractmethod
    def code_offset(self) -> int:
        """What to add to a code so that it lies in [0, 2**bits): the unsigned form that is packed."""

    @property
    def signed(self) -> bool:
        """Whether the grid has negative numbers."""
        return self.minimum < 0

    @property
    def has_zero(self) -> bool:
        """Whether 0 is representable (binary and E8M0 have none)."""
        return bool((self.round(torch.zeros(1)) == 0).item())

    def grid(self) -> Tensor:
        """All representable numbers, ascending, float32, without duplicates. Only for formats of up to 16 bits."""
        if self.bits > 16:
            raise SchemeError(f"{self.name} has 2**{self.bits} codes: too many to list")
        first = -self.code_offset
        codes = torch.arange(first, first + 2**self.bits, dtype=torch.int32)
        values = self.decode(codes.to(self.code_dtype))
        return torch.unique(values[torch.isfinite(values)])

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers of 1 to 16 bits. Rounding is to nearest, ties to even (IEEE 754 roundTiesToEven, as `torch.round`)."""

    bits: int
    is_signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise SchemeError(f"an integer format has 1 to 16 bits, not {self.bits}")

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{'int' if self.is_signed else 'uint'}{self.bits}"

    @property
    def minimum(self) -> float:
        return float(-(2 ** (self.bits - 1))) if self.is_signed else 0.0

    @property
    def maximum(self) -> float:
        return float(2 ** (self.bits - 1) - 1) if self.is_signed else float(2**self.bits - 1)

    @property
    def overflow(self) -> float:
        return self.maximum + 0.5

    @property
    def code_dtype(self) -> torch.dtype:
        if self.bits <= 8:
            return torch.int8 if self.is_signed else torch.uint8
        return torch.int16 if self.is_signed else torch.int32

    @property
    def code_offset(self) -> int:
        return 2 ** (self.bits - 1) if self.is_signed else 0

    def round(self, x: Tensor) -> Tensor:
        return torch.round(x).clamp_(self.minimum, self.maximum)

    def encode(self, values: Tensor) -> Tensor:
        return values.to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True)
class FloatFormat(Format):
    """A binary floating-point format. Rounding is to nearest, ties to even mantissa; numbers beyond the range saturate.

    `specials` says which codes are not numbers: "ieee" keeps the top exponent for Inf and NaN (E5M2, half), "fn" only
    the all-ones code for NaN (E4M3FN), "none" none (E2M1). `subnormals=False` with no sign is E8M0: powers of two only.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]
    exponent_bits: int
    mantissa_bits: int
    specials: Literal["ieee", "fn", "none"] = "none"
    is_signed: bool = True
    subnormals: bool = True

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.exponent_bits + self.mantissa_bits + int(self.is_signed)

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return (1 if self.subnormals else 0) - self.bias

    @cached_property
    def _top(self) -> tuple[int, int]:
        """Exponent and mantissa field of the largest finite number."""
        exponent, mantissa = 2**self.exponent_bits - 1, 2**self.mantissa_bits - 1
        if self.specials == "ieee":
            exponent -= 1
        elif self.specials == "fn":
            exponent, mantissa = (exponent, mantissa - 1) if self.mantissa_bits else (exponent - 1, 0)
        return exponent - self.bias, mantissa

    @property
    def maximum(self) -> float:
        exponent, mantissa = self._top
        return math.ldexp(1 + mantissa / 2**self.mantissa_bits, exponent)

    @property
    def minimum(self) -> float:
        return -self.maximum if self.is_signed else self.smallest_positive

    @property
    def smallest_positive(self) -> float:
        step = self.smallest_exponent - (self.mantissa_bits if self.subnormals else 0)
        return math.ldexp(1.0, step)

    @property
    def overflow(self) -> float:
        return self.maximum + math.ldexp(0.5, self._top[0] - self.mantissa_bits)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype with exactly this grid, where there is one."""
        return _TORCH_DTYPES.get(self.name)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def code_offset(self) -> int:
        return 0

    def round(self, x: Tensor) -> Tensor:
        if self.maximum >= torch.finfo(torch.float32).max and self.mantissa_bits >= 23:
            return x.to(torch.float32)
        x = x.to(torch.float32).clamp(-self.maximum if self.is_signed else self.smallest_positive, self.maximum)
        dtype = self.torch_dtype
        if dtype is not None and self.is_signed:
            if self.bits == 8:
                return self.decode(x.to(dtype).view(torch.uint8))
            return x.to(dtype).to(torch.float32)
        # The exponent field alone is the power of two at or below |x|; a step of the grid is that over 2**mantissa.
        step = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = step.clamp_(min=math.ldexp(1.0, self.smallest_exponent)).mul_(2.0**-self.mantissa_bits)
        return torch.round(x / step).mul_(step)

    def encode(self, values: Tensor) -> Tensor:
        if self.bits > 16:
            raise SchemeError(f"{self.name} is a storage dtype, its codes are not packed")
        if self._within_half:
            shift = 10 - self.mantissa_bits
            half = (values * 2.0 ** (self.bias - 15)).to(torch.float16).view(torch.int16)
            sign = (half >> (16 - self.bits)) & (1 << (self.bits - 1))
            return ((half >> shift) & (2 ** (self.bits - 1) - 1)).bitwise_or_(sign).to(self.code_dtype)
        magnitude = values.to(torch.float32).abs()
        normal = (magnitude.view(torch.int32) >> (23 - self.mantissa_bits)) - ((127 - self.bias) << self.mantissa_bits)
        codes = normal
        if self.subnormals:
            small = (magnitude.double() * 2.0 ** (self.mantissa_bits - self.smallest_exponent)).to(torch.int32)
            codes = torch.where(magnitude < 2.0**self.smallest_exponent, small, normal)
        if self.is_signed:
            codes = codes | (torch.signbit(values).to(torch.int32) << (self.bits - 1))
        return codes.to(self.code_dtype)

    def to_codes(self, x: Tensor) -> Tensor:
        dtype = self.torch_dtype
        if dtype is None or not self.is_signed or self.bits != 8:
            return self.encode(self.round(x))
        return x.to(torch.float32).clamp(-self.maximum, self.maximum).to(dtype).view(torch.uint8)

    @property
    def _within_half(self) -> bool:
        """Whether a code is a half-precision number times 2**k once its fields are moved to the half's places."""
        return self.is_signed and self.subnormals and self.bits <= 8 and self.exponent_bits <= 5

    def decode(self, codes: Tensor) -> Tensor:
        if self._within_half:
            bits = codes.to(torch.int16)
            magnitude = bits & (2 ** (self.bits - 1) - 1)
            half = (magnitude << (10 - self.mantissa_bits)).bitwise_or_((bits >> (self.bits - 1)) << 15)
            values = half.view(torch.float16).to(torch.float32)
            values = values if self.bias == 15 else values.mul_(2.0 ** (15 - self.bias))
            if self.specials == "fn":  # the all-ones code is the only one that is not a number
                magnitude = codes & (2 ** (self.bits - 1) - 1)
                if bool((magnitude.amax() if magnitude.numel() else magnitude.sum()) == 2 ** (self.bits - 1) - 1):
                    values = values.masked_fill_(magnitude == 2 ** (self.bits - 1) - 1, math.nan)
            return values
        codes = codes.to(torch.int32)
        mantissa = codes & (2**self.mantissa_bits - 1)
        exponent = (codes >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        fraction = mantissa.to(torch.float64) / 2**self.mantissa_bits
        values = torch.ldexp(1 + fraction, exponent - self.bias)
        if self.subnormals:
            values = torch.where(exponent == 0, torch.ldexp(fraction, torch.tensor(1 - self.bias)), values)
        if self.specials != "none":
            top_exponent, top_mantissa = self._top
            beyond = (exponent - self.bias > top_exponent) | (
                (exponent - self.bias == top_exponent) & (mantissa > top_mantissa)
            )
            values = values.masked_fill(beyond, math.nan)
        if self.is_signed:
            values = torch.where((codes >> (self.bits - 1)) & 1 == 1, -values, values)
        return values.to(torch.float32)


@dataclass(frozen=True)
class CodebookFormat(Format):
    """Any ascending list of numbers; a code is an index. The nearest entry wins, a tie goes to the smaller number."""

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)) or len(self.values) > 2**16:
            raise SchemeError(f"codebook {self.name}: 2 to 65536 different numbers in ascending order are needed")

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (len(self.values) - 1).bit_length()

    @property
    def minimum(self) -> float:
        return self.values[0]

    @property
    def maximum(self) -> float:
        return self.values[-1]

    @property
    def overflow(self) -> float:
        return self.maximum + (self.values[-1] - self.values[-2]) / 2

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def code_offset(self) -> int:
        return 0

    def grid(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32)

    def middles(self, device: torch.device | None = None) -> Tensor:
        """float32 [entries - 1]: numbers above middles[i] are nearer to the entry i + 1 than to i."""
        values = torch.tensor(self.values, dtype=torch.float64, device=device)
        exact = (values[1:] + values[:-1]) / 2
        middles = exact.to(torch.float32)
        # a middle that float32 cannot hold is rounded down, or numbers just above it would go to the smaller entry
        return torch.where(middles.double() > exact, middles.nextafter(torch.full_like(middles, -math.inf)), middles)

    def _index(self, x: Tensor) -> Tensor:
        return torch.bucketize(x.to(torch.float32).contiguous(), self.middles(x.device), out_int32=True)

    def round(self, x: Tensor) -> Tensor:
        return self.decode(self._index(x))

    def encode(self, values: Tensor) -> Tensor:
        return self._index(values).to(self.code_dtype)

    def to_codes(self, x: Tensor) -> Tensor:
        return self._index(x).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        index, count = codes.to(torch.int32).reshape(-1), len(self.values)
        if count < 2**self.bits and index.numel() and int(index.amax()) >= count:
            raise NumericsError(f"{self.name} has the codes 0 to {count - 1}, not {int(index.amax())}: a damaged file")
        return self.grid().to(codes.device).index_select(0, index).view(codes.shape)


def _normal_float(bits: int) -> tuple[float, ...]:
    """NormalFloat: quantiles of N(0, 1) with an exact zero, scaled to [-1, 1] (QLoRA, appendix E).

    2**(bits-1) quantiles on the negative side and 2**(bits-1) + 1 on the positive side share the zero; the tail
    offset is the mean of 1 - 1/(2*15) and 1 - 1/(2*16), in seven digits as for the published NF4. Rounded to float32
    where its authors did, which gives their numbers to the bit.
    """
    half = 2 ** (bits - 1)
    offset = round((1 - 1 / (4 * half) + 1 - 1 / (4 * half - 2)) / 2, 7)
    positive = _quantiles(offset, half + 1)[:-1]
    negative = -_quantiles(offset, half)[:-1]
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values.to(torch.float32)
    return tuple((values / values.abs().max()).tolist())


def _quantiles(offset: float, count: int) -> torch.Tensor:
    """Quantiles of N(0, 1), float64, at `count` float32 numbers evenly spaced from `offset` to 0.5, each counted from
    the end that is nearer."""
    first, last = (torch.tensor(end, dtype=torch.float32).double() for end in (offset, 0.5))
    step = ((last - first).float() / (count - 1)).double()
    index = torch.arange(count, dtype=torch.float64)
    points = torch.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    return normal.icdf(points.float().double())


def _bnb_fp4() -> tuple[float, ...]:
    """The numbers of bitsandbytes' FP4, which is not E2M1: 2 bits of exponent and 1 of mantissa, divided by 12."""
    positive = [0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    values = torch.tensor([*(-value for value in reversed(positive)), 0.0, *positive], dtype=torch.float32)
    return tuple((values / 12).tolist())


FP32 = FloatFormat("float32", 8, 23, "ieee")
FP16 = FloatFormat("float16", 5, 10, "ieee")
BF16 = FloatFormat("bfloat16", 8, 7, "ieee")
FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, "fn")
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2, "ieee")
FP4_E2M1 = FloatFormat("fp4_e2m1", 2, 1, "none")
E8M0 = FloatFormat("e8m0", 8, 0, "fn", is_signed=False, subnormals=False)

_IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""llama.cpp's four-bit table (ggml-common.h, kvalues_iq4nl), which was fitted and follows no rule."""

_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}


@cache
def _named_formats() -> dict[str, Format]:
    floats = {f.name: f for f in (FP32, FP16, BF16, FP8_E4M3, FP8_E5M2, FP4_E2M1, E8M0)}
    ints = {f.name: f for bits in (*range(1, 9), 16) for f in (IntFormat(bits), IntFormat(bits, False))}
    books = {
        "nf4": CodebookFormat("nf4", _normal_float(4)),
        "bnb_fp4": CodebookFormat("bnb_fp4", _bnb_fp4()),
        "ternary": CodebookFormat("ternary", (-1.0, 0.0, 1.0)),
        "binary": CodebookFormat("binary", (-1.0, 1.0)),
        "iq4_nl": CodebookFormat("iq4_nl", _IQ4_NL),
        "dynamic8": CodebookFormat("dynamic8", dynamic_values(signed=True)),
        "udynamic8": CodebookFormat("udynamic8", dynamic_values(signed=False)),
    }
    return {**ints, **floats, **books}


def get_format(name: str | Format) -> Format:
    """A format by name (case-insensitive): int1..int8, int16, uint1..uint8, uint16, fp8_e4m3, fp8_e5m2, fp4_e2m1, nf4,
    bnb_fp4, iq4_nl, ternary, binary, dynamic8, udynamic8, and the scale dtypes float32, float16, bfloat16, e8m0.

    Raises SchemeError for an unknown name, listing all.
    """
    if isinstance(name, Format):
        return name
    formats = _named_formats()
    found = formats.get(name.lower())
    if found is None:
        raise SchemeError(f"unknown format {name!r}; known formats: {', '.join(formats)}")
    return found


def is_named(format: Format) -> bool:
    """Whether `get_format` gives it by its name: files can say then which it is."""
    return _named_formats().get(format.name) == format
