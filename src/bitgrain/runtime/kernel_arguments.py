"""A packed matrix and a quantizer of inputs in the terms of the kernels, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bitgrain.kernels.code_linear import FLOAT8, SCALE_DTYPES, CodeTable
from bitgrain.kernels.float_inputs import FORMATS, FloatInputs
from bitgrain.kernels.int_linear import IntInputs
from bitgrain.kernels.native import DTYPES
from bitgrain.numerics import QTensor, QuantSpec, per_tensor, per_token
from bitgrain.numerics.formats import E8M0, FP8_E4M3, FP32, FloatFormat, Format, IntFormat
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.qtensor import scale_values, unsigned
from bitgrain.numerics.ranges import MinMax
from bitgrain.runtime.activations import InputQuantizer

_AS_INTEGERS = {"ternary": 1, "binary": 0.5}
"""Codebooks that are integers: the code of a 0, which binary does not have."""


def refuse_codes(spec: QuantSpec) -> str | None:
    """Why no kernel looks up weights of such a spec, or None."""
    fits = (isinstance(spec.format, IntFormat) and spec.format.bits <= 8) or spec.format.bits <= 4
    return None if fits or _float8(spec.format) is not None else f"weights in {spec.format}"


def refuse_integers(spec: QuantSpec) -> str | None:
    """Why no integer kernel multiplies by weights of such a spec, or None."""
    if spec.format.name == "binary" and spec.minimum is not None:
        return "binary weights with minima and quantized inputs"
    if spec.format.name not in _AS_INTEGERS and not (isinstance(spec.format, IntFormat) and spec.format.bits <= 8):
        return f"weights in {spec.format} and quantized inputs"
    return f"weights with {100 * spec.outliers:g} % outliers and quantized inputs" if spec.outliers else None


def refuse_inputs(spec: QuantSpec) -> str | None:
    """Why integer kernels do not quantize inputs like this, or None."""
    if not isinstance(spec.format, IntFormat) or spec.format.bits > 8:
        return f"inputs in {spec.format}"
    if not spec.dynamic:
        fits = spec.granularity == per_tensor() and spec.zero_point != "real" and isinstance(spec.scale, Format)
        return None if fits else f"static inputs {spec.describe()}"
    token = spec.granularity == per_token() and spec.symmetric and spec.restricted and spec.scale == FP32
    return None if token else f"dynamic inputs {spec.describe()}"


def refuse_ordered(weight: QuantSpec, inputs: QuantSpec) -> str | None:
    """Why inputs cannot be gathered in the order of such a weight's columns before they are quantized, or None."""
    whole = inputs.clusters == 0 and (not inputs.dynamic or inputs.granularity.cols is None)
    if whole or not weight.ordered:
        return None
    return f"weights with an order of their columns beside inputs in groups of channels, {inputs.describe()}"


def refuse_float_inputs(spec: QuantSpec, weight: QuantSpec) -> str | None:
    """Why kernels do not round inputs like this before they meet such a weight, or None."""
    if weight.outliers:
        return f"weights with {100 * weight.outliers:g} % outliers and quantized inputs"
    told = f"{'dynamic' if spec.dynamic else 'static'} inputs {spec.describe()}"
    if spec.format.name not in FORMATS or not spec.symmetric or spec.threshold:
        return told
    if not spec.dynamic:
        fits = spec.granularity == per_tensor() and isinstance(spec.scale, Format) and not spec.clusters
        return None if fits else told
    if spec.range != MinMax() or not (spec.scale in (FP32, E8M0) or _is_nvfp4(spec)) or spec.granularity.rows != 1:
        return told
    own, group = spec.granularity.cols, weight.granularity.cols
    if own is not None and own != group:
        shared = "whole rows" if group is None else f"groups of {group}"
        return f"{told} beside weights in {shared}: inputs have a scale for each token, or for each group of the weight"
    return None


def refuse_rows(spec: QuantSpec) -> str | None:
    """Why no kernel looks up rows of an embedding of such a spec, or None."""
    if spec.format.bits > 8:
        return f"embeddings in {spec.format}"
    if spec.ordered:
        return "embeddings with an order of their columns"
    return "embeddings with outliers or columns apart" if spec.outliers or spec.columns else None


def refuse_shared(spec: QuantSpec) -> str | None:
    """The same where a kernel that multiplies by the weight gives the rows: it may have added to real zero points."""
    reason = "real zero points of an embedding tied to the head" if spec.zero_point == "real" else None
    return refuse_rows(spec) or reason


@dataclass(frozen=True)
class Spans:
    """Runs of input features with one weight scale and one input scale.

    lengths  of each; groups: which of the weight's tiles across it lies in
    """

    lengths: tuple[int, ...]
    groups: tuple[int, ...]

    @staticmethod
    def of(weight: QuantSpec, shape: tuple[int, int], quantizer: InputQuantizer | None) -> Spans:
        """The union of the weight's groups and the inputs' clusters."""
        features, group = shape[1], weight.granularity.tile(shape)[1]
        ends = {*range(group, features, group), features}
        static = None if quantizer is None else quantizer.static
        if static is not None and static.scale.shape[-1] > 1:  # by channel: clusters
            new = static.scale[0, 1:] != static.scale[0, :-1]
            if static.zero is not None:
                new |= static.zero[0, 1:] != static.zero[0, :-1]
            ends |= {int(place) + 1 for place in new.nonzero()}
        stops = sorted(ends)
        lengths = tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True))
        return Spans(lengths, tuple((stop - 1) // group for stop in stops))


def integer_inputs(quantizer: InputQuantizer, lengths: Sequence[int]) -> IntInputs:
    """The quantization of inputs that `refuse_inputs` does not refuse, for spans of these lengths."""
    spec, codes = quantizer.spec, quantizer.all_codes
    if quantizer.static is None:
        if quantizer.in_own_dtype:  # compressed-tensors: half the width of the full range
            return IntInputs(int(codes.low), int(codes.high), (codes.high - codes.low) / 2)
        return IntInputs(int(spec.low), int(spec.high), spec.high)
    firsts = [0, *accumulate(lengths)][:-1]
    scale, zero = quantizer.static.scale.float(), quantizer.static.zero
    places = firsts if scale.numel() > 1 else [0] * len(firsts)
    scales = scale.reshape(-1)[places].tolist()
    zeros = [0] * len(firsts) if zero is None else zero.reshape(-1)[places].tolist()
    return IntInputs(int(codes.low), int(codes.high), scales=tuple(scales), zeros=tuple(zeros))


def float_inputs(quantizer: InputQuantizer) -> FloatInputs:
    """The rounding of inputs that `refuse_float_inputs` does not refuse."""
    spec = quantizer.spec
    if quantizer.static is not None:
        return FloatInputs(spec.format.name, "fixed", outer=float(quantizer.static.scale.float()) or 1.0)
    groups = spec.granularity.cols is not None
    if isinstance(spec.scale, QuantSpec):
        assert quantizer.outer_scale is not None
        return FloatInputs(spec.format.name, "e4m3", groups, quantizer.outer_scale)
    return FloatInputs(spec.format.name, "e8m0" if spec.scale == E8M0 else "float32", groups)


def integer_scales(weight: PackedMatrix, spans: Spans) -> tuple[Tensor, int | Tensor, Tensor | None]:
    """Scales, zero points and minima of `IntLinear.pack_words`, a row for each output and a column for each span."""
    spec = weight.spec
    index = torch.tensor(spans.groups)
    tiles, minimum = _scale_and_minimum(weight, _plain(weight.scale, DTYPES))
    scale = _rows(tiles, weight).index_select(1, index)
    minimum = None if minimum is None else _rows(minimum, weight).index_select(1, index)
    if spec.format.name == "binary":  # -1 and 1 are 2 (code - 1/2)
        return scale * 2, torch.full(scale.shape, 0.5), None
    offset = int(_AS_INTEGERS.get(spec.format.name, spec.format.code_offset))
    if weight.zero is None:
        return scale, offset, minimum
    zero = _rows(weight.zero, weight).index_select(1, index)
    if spec.zero_point == "integer":
        return scale, unsigned(zero, spec.format), None
    return scale, zero.to(torch.float32) + offset, None


@dataclass(frozen=True)
class CodeScales:
    """Arguments of `CodeLinear.pack_words`."""

    scale: Tensor
    table: CodeTable
    zero: Tensor | float | None
    minimum: Tensor | None
    outer: float


def code_scales(weight: PackedMatrix) -> CodeScales:
    """For a weight that `refuse_codes` does not refuse."""
    spec, format = weight.spec, weight.spec.format
    if weight.minimum is not None:
        tiles, minimum = _scale_and_minimum(weight, _plain(weight.scale, DTYPES))
        assert minimum is not None
        table = _float8(format) or (_table(format) if format.bits <= 4 else None)
        half = -float(2 ** (format.bits - 1)) if table is None and not format.signed else 0.0
        return CodeScales(_rows(tiles, weight), table, half, _rows(minimum, weight), 1.0)
    scale, outer = _scale_and_outer(weight)
    rows = _rows(_plain(scale, SCALE_DTYPES), weight)
    zero = None if weight.zero is None else _rows(weight.zero, weight)
    if (dtype := _float8(format)) is not None:
        return CodeScales(rows, dtype, None if zero is None else zero.to(torch.float32), None, outer)
    if format.bits > 4:  # signed bytes
        if zero is not None:
            zero = zero.to(torch.float32)
        elif not format.signed:
            zero = torch.zeros(rows.shape)
        if zero is not None and not format.signed:
            zero = zero - 2 ** (format.bits - 1)
        return CodeScales(rows, None, zero, None, outer)
    if zero is not None and spec.zero_point == "integer":
        return CodeScales(rows, [float(code) for code in range(2**format.bits)], unsigned(zero, format), None, outer)
    return CodeScales(rows, _table(format), None if zero is None else zero.to(torch.float32), None, outer)


def row_scales(weight: PackedMatrix) -> CodeScales:
    """The same for the look-up of rows that `refuse_rows` does not refuse: any table, zeros and minima as they are."""
    scale, outer = _scale_and_outer(weight)
    zero = None if weight.zero is None else _rows(weight.zero, weight)
    minimum = None if weight.minimum is None else _rows(_plain(weight.minimum, SCALE_DTYPES), weight)
    return CodeScales(_rows(_plain(scale, SCALE_DTYPES), weight), _table(weight.spec.format), zero, minimum, outer)


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes of a format of `bits` bits out of what `unpack` of the kernels gives."""
    return codes.view(torch.uint8) + 2 ** (bits - 1) if codes.dtype == torch.int8 else codes


def stored_tiles(
    spans: Tensor, weight: QuantSpec, shape: tuple[int, int], groups: Sequence[int] | None = None
) -> Tensor:
    """Scales or zero points as a QTensor has them, out of those that kernels hold for each row and span."""
    tiles = spans[:: weight.granularity.tile(shape)[0]]
    if groups is None:
        return tiles
    return tiles.index_select(1, torch.tensor([groups.index(i) for i in range(weight.granularity.tiles(shape)[1])]))


def plain_dtype(storage: Format | QuantSpec) -> torch.dtype | None:
    """The dtype of scales or minima that are stored plainly."""
    return storage.torch_dtype if isinstance(storage, FloatFormat) else None


def _scale_and_outer(weight: PackedMatrix) -> tuple[Tensor | QTensor, float]:
    """Scales, and the scale of the scales where those are kept as they are (NVFP4); minima have no such one."""
    scale, nested = weight.scale, _is_nvfp4(weight.spec) and weight.minimum is None
    if isinstance(scale, QTensor) and nested and isinstance(scale.scale, Tensor):
        return scale.codes.view(torch.float8_e4m3fn), float(scale.scale.to(torch.float32))
    return scale, 1.0


def _scale_and_minimum(weight: PackedMatrix, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and minima as panels hold them: in one dtype, theirs where they share it, else float32."""
    if weight.minimum is None:
        return scale, None
    if isinstance(weight.minimum, Tensor) and weight.minimum.dtype == scale.dtype:
        return scale, weight.minimum
    return scale.to(torch.float32), scale_values(weight.minimum)


def _plain(scale: Tensor | QTensor, known: dict[torch.dtype, int]) -> Tensor:
    return scale if isinstance(scale, Tensor) and scale.dtype in known else scale_values(scale)


def _rows(tiles: Tensor, weight: PackedMatrix) -> Tensor:
    """Tiles [down, across] as each row has them."""
    rows = weight.spec.granularity.tile(weight.shape)[0]
    return tiles if rows == 1 else tiles.repeat_interleave(rows, 0)[: weight.shape[0]]


def _float8(format: Format) -> torch.dtype | None:
    """The dtype that kernels decode codes of 8 bits as, where they are not integers."""
    dtype = format.torch_dtype if isinstance(format, FloatFormat) else None
    return dtype if dtype in FLOAT8 else None


def _is_nvfp4(spec: QuantSpec) -> bool:
    return isinstance(spec.scale, QuantSpec) and (spec.scale.format, spec.scale.granularity) == (FP8_E4M3, per_tensor())


def _table(format: Format) -> list[float]:
    """The numbers that unsigned codes of `format` mean."""
    if isinstance(format, IntFormat):
        return [float(code - format.code_offset) for code in range(2**format.bits)]
    count = len(format.grid()) if not isinstance(format, FloatFormat) else 2**format.bits
    return format.decode(torch.arange(count, dtype=torch.uint8)).tolist()
