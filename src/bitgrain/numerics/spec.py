"""QuantSpec: one value that says everything about how a tensor is quantized.

Format x Granularity x zero point x Range x scale storage x static or dynamic. The parts are orthogonal; only
combinations without a meaning are refused. The scale's own storage is either a plain format (fp16, e8m0, ...) or
another QuantSpec, applied to the matrix of scales: that is double quantization, and NVFP4 is an instance of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from bitgrain.errors import SchemeError
from bitgrain.numerics.columns import ColumnChoice
from bitgrain.numerics.formats import (
    BF16,
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP16,
    FP32,
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    get_format,
)
from bitgrain.numerics.granularity import Granularity, matrix_shape, per_channel, per_group, per_run, per_tensor
from bitgrain.numerics.outliers import VALUE_DTYPE, column_dtype
from bitgrain.numerics.ranges.base import Range
from bitgrain.numerics.ranges.minmax import MinMax

ZeroPoint = Literal["none", "integer", "real", "minimum"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    format       the grid of numbers
    granularity  the tile that shares one scale
    zero_point   "none": symmetric, x = s * v; "integer": asymmetric, x = s * (v - z) with z a code of the format;
                 "real": z is any number in the scale's storage dtype (as HQQ's zero); "minimum": x = s * v - m with m
                 in a storage of its own (llama.cpp's k-quants, MLX)
    restricted   symmetric integers only: leave out the most negative code, so that the grid is symmetric
                 (int8 is -127..127, and scale = absmax / 127); False uses the full range
    range        how a tile's limits are chosen
    scale        storage of the scales: a float format, or a QuantSpec (double quantization)
    minimum      storage of the minima, likewise; None without minima
    dynamic      scales are computed from the data at run time (activations)
    outliers     share of the elements that are kept in float16 beside the codes (SpQR: about 0.01); how many they are
                 depends on the shape alone, so that every byte is known beforehand
    threshold    inputs with dynamic scales only: channels in which some number of the batch reaches it are multiplied
                 in full precision, and do not count for the scales (LLM.int8(), arXiv 2208.07339: 6); 0 for none
    columns      weights only: input channels whose columns are kept in 16 bits beside the codes, and which are then
                 multiplied in full precision also where inputs are quantized; None for none
    clusters     inputs with static scales only: into how many runs of neighbouring channels, of any sizes, they are
                 divided, each with a scale (and zero point) of its own (RPTQ, arXiv 2304.01089); 0: one for all
    ordered      weights only: tiles are of columns in an order of their own, which is stored (GPTQ's act-order with
                 groups, there `g_idx`)
    """

    format: Format
    granularity: Granularity
    zero_point: ZeroPoint = "none"
    restricted: bool = False
    range: Range = field(default_factory=MinMax)
    scale: Format | QuantSpec = FP32
    dynamic: bool = False
    outliers: float = 0.0
    threshold: float = 0.0
    columns: ColumnChoice | None = None
    clusters: int = 0
    minimum: Format | QuantSpec | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.restricted and not (self.symmetric and isinstance(self.format, IntFormat) and self.format.signed):
            raise SchemeError("restricted range means a symmetric signed integer format")
        if self.symmetric and self.format == IntFormat(1):
            raise SchemeError("symmetric int1 has only the numbers -1 and 0; use binary, ternary or a zero point")
        if self.zero_point == "integer" and not isinstance(self.format, IntFormat):
            raise SchemeError(f"an integer zero point needs an integer format, {self.format} takes zero_point='real'")
        if (self.zero_point == "minimum") != (self.minimum is not None):
            raise SchemeError("zero_point 'minimum' and the storage of the minima go together: give both, or neither")
        for storage in (self.scale, self.minimum):
            if isinstance(storage, Format) and not (isinstance(storage, FloatFormat) and storage.torch_dtype):
                raise SchemeError(
                    f"scales are stored as float32, float16, bfloat16, e8m0, fp8_e4m3 or fp8_e5m2, not {storage}"
                )
        if self.minimum == E8M0:
            raise SchemeError("minima cannot be stored in e8m0, which has no sign and no zero")
        if not self.symmetric and self.scale == E8M0 and self.zero_point == "real":
            raise SchemeError("a real zero point cannot be stored in e8m0, which has no sign and no zero")
        if not 0 <= self.outliers <= 0.5:
            raise SchemeError(f"outliers are a share of the elements from 0 to 0.5, not {self.outliers}")
        if self.outliers and self.dynamic:
            raise SchemeError("outliers are kept for weights, not for what is quantized at run time")
        if self.threshold < 0 or (self.threshold and not self.dynamic):
            raise SchemeError(
                f"a threshold of outlier channels is for inputs with dynamic scales, not {self.threshold:g}"
            )
        if self.clusters < 0 or (self.clusters and (self.dynamic or self.granularity != per_tensor())):
            raise SchemeError(
                f"clusters of channels are for static per_tensor inputs, which they divide: not {self.clusters} of "
                f"{'dynamic ' if self.dynamic else ''}{self.granularity}"
            )
        if isinstance(self.minimum, QuantSpec) and not self.minimum.symmetric:
            raise SchemeError("minima that are quantized themselves have no zero points")
        for nested in (self.scale, self.minimum):
            if isinstance(nested, QuantSpec) and (nested.outliers or nested.ordered):
                raise SchemeError("scales of scales have no outliers or order of their own")
            if isinstance(nested, QuantSpec) and isinstance(nested.minimum, QuantSpec):
                raise SchemeError("minima of scales of scales are stored plainly")
            if self.columns and (self.dynamic or (isinstance(nested, QuantSpec) and nested.columns)):
                raise SchemeError("columns are kept of weights, not of inputs or of scales")
        if self.granularity.run is not None and (self.dynamic or self.columns or not isinstance(self.scale, Format)):
            raise SchemeError(f"{self.granularity} is for scales of scales")
        if self.ordered and (self.dynamic or self.outliers or self.columns or self.granularity.cols is None):
            raise SchemeError("an order of the columns is for weights in groups, without outliers or kept columns")

    def __repr__(self) -> str:
        rare = ("outliers", "threshold", "columns", "clusters", "minimum", "ordered")
        shown = [f for f in fields(self) if f.name not in rare or getattr(self, f.name)]
        return f"QuantSpec({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def symmetric(self) -> bool:
        """No zero point: the grid's 0 means 0."""
        return self.zero_point == "none"

    @property
    def low(self) -> float:
        """The smallest number of the format that is used."""
        return -self.format.maximum if self.restricted else self.format.minimum

    @property
    def high(self) -> float:
        """The largest number of the format that is used."""
        return self.format.maximum

    @property
    def signed_scale(self) -> bool:
        """Whether a scale may be negative: then the larger end of a tile can get the one more code of integers.

        Only full-range integers and IQ4_NL have an end that is longer, and only float storage or nested signed integers
        have a sign.
        """
        longer = self.symmetric and self.low < -self.high and isinstance(self.format, IntFormat | CodebookFormat)
        if isinstance(self.scale, QuantSpec):
            signed = self.scale.symmetric and isinstance(self.scale.format, IntFormat) and self.scale.format.signed
        else:
            signed = isinstance(self.scale, FloatFormat) and self.scale.is_signed
        return longer and signed and not self.dynamic

    @property
    def least_minimum(self) -> float:
        """The least minimum that can be stored."""
        storage = self.minimum.format if isinstance(self.minimum, QuantSpec) else self.minimum
        return -math.inf if storage is None or storage.signed else 0.0

    @property
    def scale_format(self) -> Format:
        """The format in which one scale is stored."""
        return self.scale.format if isinstance(self.scale, QuantSpec) else self.scale

    def with_scale_dtype(self, format: Format) -> QuantSpec:
        """The same, with plainly stored scales in `format`; nested and special storage (e8m0, ...) stays."""
        return replace(self, scale=format) if self.scale in (FP32, FP16, BF16) else self

    def describe(self) -> str:
        """For tables: `int4 per_group(128) asymmetric, scale bfloat16`."""
        parts = [str(self.format), str(self.granularity)]
        parts += [] if self.symmetric else [_ZERO_POINTS[self.zero_point]]
        parts += ["act-order"] if self.ordered else []
        parts += [f"{100 * self.outliers:g} % outliers"] if self.outliers else []
        parts += [self.columns.describe()] if self.columns else []
        parts += [] if isinstance(self.range, MinMax) else [f"range {self.range}"]
        parts += ["dynamic"] if self.dynamic else []
        parts += [f"channels from {self.threshold:g} in full precision"] if self.threshold else []
        parts += [f"in {self.clusters} clusters of channels"] if self.clusters else []
        nested = isinstance(self.scale, QuantSpec)
        return " ".join(parts) + ("" if self.dynamic else f", scale {self.scale_format}{' in scale' if nested else ''}")

    def count_outliers(self, shape: tuple[int, ...]) -> int:
        """How many elements of a tensor of `shape` are outliers."""
        return round(self.outliers * math.prod(shape))

    def count_bits(self, shape: tuple[int, ...]) -> int:
        """Bits of codes, scales, zero points, outliers and kept columns of a tensor of `shape`, densely packed, without
        headers."""
        down, across = self.granularity.tiles(shape)
        bits = math.prod(shape) * self.format.bits
        for storage in (self.scale, self.minimum):
            if isinstance(storage, QuantSpec):
                bits += storage.count_bits((down, across))
            elif storage is not None:
                bits += down * across * storage.bits
        bits += 32 * matrix_shape(shape)[1] if self.ordered else 0
        if self.zero_point == "integer":
            bits += down * across * self.format.bits
        elif self.zero_point == "real":
            bits += down * across * self.scale_format.bits
        if self.outliers:
            rows, cols = matrix_shape(shape)
            each = 8 * (VALUE_DTYPE.itemsize + column_dtype(cols).itemsize)
            bits += self.count_outliers(shape) * each + 32 * (rows + 1)
        if self.columns:
            bits += self.columns.count_bits(*matrix_shape(shape))
        return bits


_ZERO_POINTS = {"integer": "asymmetric", "real": "real zero point", "minimum": "with minima"}


def mxfp4(dynamic: bool = False) -> QuantSpec:
    """MXFP4 (OCP Microscaling Formats 1.0): E2M1 in groups of 32 that share a power of two."""
    return QuantSpec(FP4_E2M1, per_group(32), scale=E8M0, dynamic=dynamic)


def nvfp4(dynamic: bool = False) -> QuantSpec:
    """NVFP4: E2M1 in groups of 16 with E4M3 scales that share one scale for the tensor.

    The shared scale is a power of two here: then E2M1 x E4M3 x shared is exact in bfloat16, and every engine decodes
    the same numbers, whatever dtype it multiplies in. E4M3 has range to spare, so nothing is lost.
    """
    return QuantSpec(FP4_E2M1, per_group(16), scale=QuantSpec(FP8_E4M3, per_tensor(), scale=E8M0), dynamic=dynamic)


def nf4_double_quantized(group: int = 64) -> QuantSpec:
    """NF4 whose scales are themselves 8-bit in groups of 256 (QLoRA, arXiv 2305.14314, section 3)."""
    inner = QuantSpec(IntFormat(8, is_signed=False), per_group(256), zero_point="integer", scale=FP32)
    return QuantSpec(get_format("nf4"), per_group(group), scale=inner)


def bnb_4bit(format: str = "nf4", group: int = 64, *, double: bool = True) -> QuantSpec:
    """What bitsandbytes stores: `nf4` or `bnb_fp4` in blocks with float32 scales.

    double: these, less their mean, in the dynamic 8-bit code in runs of 256, which go on over the ends of rows: scale =
    code * scale of the run + mean, as in QLoRA (arXiv 2305.14314, section 3).
    """
    nested = QuantSpec(get_format("dynamic8"), per_run(256), zero_point="minimum", minimum=FP32)
    return QuantSpec(get_format(format), per_group(group), scale=nested if double else FP32)


def int_weight(bits: int, group: int | None = None, *, asymmetric: bool = False, scale: Format = FP32) -> QuantSpec:
    """Weight-only integers as GPTQ, AWQ and compressed-tensors store them: per group along the inputs, or per row."""
    granularity = per_group(group) if group else per_channel()
    return QuantSpec(IntFormat(bits), granularity, zero_point="integer" if asymmetric else "none", scale=scale)
