"""How far a quantized tensor is from the original: float64 sums, the same for any threads and any split of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.formats import CodebookFormat, Format
from bitgrain.numerics.granularity import matrix_shape, to_tiles
from bitgrain.numerics.qtensor import QTensor
from bitgrain.numerics.quotient import quotient
from bitgrain.numerics.sums import row_sums

_PIECE = 2**16  # elements that are worked on at a time: their float64 copies stay in a core's cache


@dataclass(frozen=True)
class ErrorReport:
    """Errors of one tensor.

    mse        mean of (x - x_hat)^2, in the tensor's units squared
    sqnr_db    10 log10(sum x^2 / sum (x - x_hat)^2), in dB; inf if exact (also for an all-zero x), -inf if x is all
               zero
    cosine     of the angle between x and x_hat; 1 if both are 0, 0 if one is
    max_error  largest |x - x_hat|
    elements   how many
    """

    mse: float
    sqnr_db: float
    cosine: float
    max_error: float
    elements: int


@dataclass(frozen=True)
class CodeUse:
    """How much of the code range tiles use: shares in [0, 1], mean and minimum over the tiles.

    hit   different codes that occur / as many as could occur (codes of the format, or elements if these are fewer)
    span  (largest - smallest number) / (the range of numbers the spec uses)
    """

    hit_mean: float
    hit_min: float
    span_mean: float
    span_min: float


def row_errors(x: Tensor, x_hat: Tensor) -> Tensor:
    """Sums of error^2, x^2, x_hat^2, x * x_hat and the largest |error| for each row of the matrix that `x` is seen as.

    float64 [rows, 5]. Rows of pieces of a tensor can be put one below the other: `summarize` gives the same for any
    split.
    """
    if x.shape != x_hat.shape:
        raise SchemeError(f"tensors of different shapes {tuple(x.shape)} and {tuple(x_hat.shape)} are compared")
    shape = matrix_shape(tuple(x.shape))
    a, b = x.reshape(shape), x_hat.reshape(shape)
    if not x.numel():
        return torch.zeros(shape[0], 5, dtype=torch.float64, device=x.device)
    step = max(1, _PIECE // shape[1])
    parts = zip(a.split(step), b.split(step), strict=True)
    return torch.cat([_errors(part.to(torch.float32), part_hat.to(torch.float32)) for part, part_hat in parts])


def _errors(a: Tensor, b: Tensor) -> Tensor:
    """`row_errors` of a few rows, float32."""
    error = b - a
    largest = error.abs().amax(dim=-1).double()
    error, wide_a, wide_b = error.double(), a.double(), b.double()
    sums = [error.square_(), wide_a * wide_b, wide_a.square_(), wide_b.square_()]
    error_power, product, power, power_hat = (row_sums(term) for term in sums)
    return torch.stack([error_power, power, power_hat, product, largest], dim=-1)


def summarize(rows: Tensor | Sequence[Tensor], elements: int) -> ErrorReport:
    """The report of a tensor of `elements` elements from its `row_errors`; exactly rounded sums, so in any order."""
    table = rows if isinstance(rows, Tensor) else torch.cat(list(rows))
    columns: list[list[float]] = table.t().tolist()
    error, power, power_hat, product = (math.fsum(column) for column in columns[:4])
    sqnr = math.inf if error == 0 else -math.inf
    if error > 0 and power > 0:
        sqnr = 10 * math.log10(power / error)
    norms = math.sqrt(power) * math.sqrt(power_hat)
    cosine = max(-1.0, min(1.0, product / norms)) if norms > 0 else float(power == power_hat)
    return ErrorReport(error / max(1, elements), sqnr, cosine, max(columns[4], default=0.0), elements)


def compare(x: Tensor, x_hat: Tensor) -> ErrorReport:
    """All measures of `x_hat` against `x`. Raises SchemeError if the shapes differ."""
    return summarize(row_errors(x, x_hat), x.numel())


def measure(x: Tensor, q: QTensor) -> ErrorReport:
    """All measures of a quantized tensor against the original."""
    return compare(x, q.dequantize())


def mse(x: Tensor, x_hat: Tensor) -> float:
    """Mean squared error."""
    return compare(x, x_hat).mse


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal to quantization noise ratio in dB."""
    return compare(x, x_hat).sqnr_db


def cosine(x: Tensor, x_hat: Tensor) -> float:
    """Cosine similarity."""
    return compare(x, x_hat).cosine


def max_error(x: Tensor, x_hat: Tensor) -> float:
    """Largest absolute error."""
    return compare(x, x_hat).max_error


def code_use(q: QTensor) -> CodeUse:
    """How much of the code range each tile of `q` really uses. Only for formats of up to 8 bits."""
    spec = q.spec
    if spec.format.bits > 8:
        raise SchemeError(f"code use is counted for formats of up to 8 bits, not {spec.format}")
    numbers = _numbers(spec.format).to(q.codes.device)
    codes = numbers.numel()
    tiles = to_tiles(q.unsigned_codes().to(torch.int16), spec.granularity, fill=codes).flatten(0, 1)
    used = torch.zeros(tiles.shape[0], codes + 1, dtype=torch.bool, device=tiles.device)
    for start in range(0, tiles.shape[-1], 4096):  # the index takes 8 bytes for each element
        used.scatter_(-1, tiles[:, start : start + 4096].to(torch.int64), True)
    used = used[:, :codes]
    usable = int(numbers.isfinite().sum().item()) - int(spec.restricted)
    hit = used.sum(-1).double() / (tiles < codes).sum(-1).clamp(max=usable)
    low, high = torch.where(used, numbers, math.inf).amin(-1), torch.where(used, numbers, -math.inf).amax(-1)
    span = quotient(high.double() - low.double(), spec.high - spec.low)
    tile_count = hit.numel()
    return CodeUse(
        math.fsum(hit.tolist()) / tile_count,
        float(hit.min()),
        math.fsum(span.tolist()) / tile_count,
        float(span.min()),
    )


def _numbers(format: Format) -> Tensor:
    """What each unsigned code of `format` means, float32; Inf or NaN for codes that are not numbers."""
    if isinstance(format, CodebookFormat):
        return format.grid()
    unsigned = torch.arange(2**format.bits, dtype=torch.int32)
    return format.decode((unsigned - format.code_offset).to(format.code_dtype))
