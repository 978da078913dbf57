"""One weight matrix: its channels, and what each granularity would lose at 8 and at 4 bits.

Two passes over bands of rows: the first takes ranges and moments from every row; the second rounds and measures, on
every row or, in large matrices, on evenly spaced bands of 128 rows. Scales always come from all rows. Every sum is
exact in its order (numerics/sums.py, math.fsum), so no figure depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bitgrain.evaluation.inspection.channels import (
    ChannelRanges,
    describe_channels,
    excess_kurtosis,
    power_sums,
    sqnr_db,
)
from bitgrain.numerics import (
    QuantSpec,
    choose_scale,
    get_format,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)
from bitgrain.numerics.affine import from_grid, to_grid
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.sums import row_sums
from bitgrain.recipes import Scheme

FORMATS = ("int8", "int4")
GRANULARITIES = {
    "per_tensor": per_tensor(),
    "per_block(128, 128)": per_block(128, 128),
    "per_channel": per_channel(0),
    "per_channel(1)": per_channel(1),
    "per_group(128)": per_group(128),
    "per_group(64)": per_group(64),
    "per_group(32)": per_group(32),
}
RECOMMENDABLE = tuple(name for name in GRANULARITIES if name != "per_channel(1)")
"""A scale for each input channel cannot leave the sum over the inputs, so it is measured but never recommended."""
TOLERANCE_DB = 3.0
"""Half a bit: one bit more of width gains 6.02 dB, and the 16-bit scales of per_group(32) cost 0.5 bits a weight."""
SENSITIVITY = ("per_group(128)", "int4")
"""The combination by which layers are ranked."""
EXACT_ELEMENTS = 1 << 24
"""Matrices of up to this many elements are rounded whole; of larger ones about as many, in bands of rows."""
_BAND = 128
_CHUNK_ELEMENTS = 1 << 19
_WORD = 8


@dataclass(frozen=True)
class MatrixLoss:
    """What one format and granularity does to a weight (symmetric, min-max range).

    sqnr_db          of the dequantized weight; inf if exact
    bits_per_weight  codes and scales, the scales in the checkpoint's own dtype
    span             mean over the tiles of (largest - smallest code) / (range of the codes)
    hit              mean over the tiles of the share of codes that occur, of those that could (tile size permitting)
    """

    granularity: str
    format: str
    sqnr_db: float
    bits_per_weight: float
    span: float
    hit: float


@dataclass(frozen=True)
class LayerInspection:
    """One weight matrix [out, in], or the experts of one layer: then every figure is that of the worst expert.

    matrices       how many it stands for; worst_matrix: the one of lowest SQNR at int4 per_group(128), None for 1
    nonfinite      NaN and Inf; a matrix that holds any gives no figures
    sampled_rows   rows that the losses were measured on; None: all of them. All other figures are of all rows
    zeros          share of elements that are 0. kurtosis: excess, over all elements; None if all are equal
    outputs        ranges of the rows (output channels); inputs: of the columns (input channels)
    recommended    by format: see `recommend`
    """

    module: str
    kind: str
    role: str
    block: int | None
    shape: tuple[int, int]
    matrices: int
    dtype: str
    nonfinite: int
    sampled_rows: int | None
    absmax: float | None
    zeros: float | None
    kurtosis: float | None
    outputs: ChannelRanges | None
    inputs: ChannelRanges | None
    losses: tuple[MatrixLoss, ...]
    recommended: Mapping[str, str]
    worst_matrix: int | None = None

    @property
    def elements(self) -> int:
        return self.matrices * self.shape[0] * self.shape[1]

    def loss(self, granularity: str, format: str) -> MatrixLoss | None:
        """One combination; None if it was not measured."""
        return next((x for x in self.losses if (x.granularity, x.format) == (granularity, format)), None)

    def sqnr(self, granularity: str, format: str) -> float | None:
        """dB of one combination; None if it was not measured."""
        found = self.loss(granularity, format)
        return None if found is None else found.sqnr_db


def inspect_matrix(
    matrix: Tensor, *, max_rows: int | Literal["auto"] | None = "auto", tolerance_db: float = TOLERANCE_DB
) -> LayerInspection:
    """Inspect one weight [out, in] of any float dtype; see `inspect_model`. Names in the result are empty."""
    rows, cols = matrix.shape
    low = high = None
    sums: list[list[float]] = []
    nonfinite = zeros = 0
    row_low: list[Tensor] = []
    row_high: list[Tensor] = []
    for start, stop in _bands(rows, cols, rows):
        x = matrix[start:stop].to(torch.float32)
        powers = power_sums(x)
        if not bool(torch.isfinite(powers[:, 1]).all()):
            nonfinite += int((~torch.isfinite(x)).sum())
            continue
        zeros += int((x == 0).sum())
        sums += powers.tolist()
        row_low.append(x.amin(1))
        row_high.append(x.amax(1))
        low = x.amin(0) if low is None else torch.minimum(low, x.amin(0))
        high = x.amax(0) if high is None else torch.maximum(high, x.amax(0))

    def result(**figures: Any) -> LayerInspection:
        dtype = str(matrix.dtype).removeprefix("torch.")
        return LayerInspection("", "", "linear", None, (rows, cols), 1, dtype, nonfinite, **figures)

    if nonfinite or low is None or high is None:
        return result(
            sampled_rows=None,
            absmax=None,
            zeros=None,
            kurtosis=None,
            outputs=None,
            inputs=None,
            losses=(),
            recommended={},
        )
    wanted = rows
    if max_rows == "auto":
        wanted = rows if rows * cols <= EXACT_ELEMENTS else max(1, EXACT_ELEMENTS // cols)
    elif max_rows is not None:
        wanted = min(rows, max_rows)
    bands = list(_bands(rows, cols, wanted))
    measured = sum(stop - start for start, stop in bands)
    losses = _losses(matrix, bands, torch.stack([low, high]))
    outputs, inputs = describe_channels(torch.cat(row_low), torch.cat(row_high)), describe_channels(low, high)
    return result(
        sampled_rows=None if measured == rows else measured,
        absmax=inputs.absmax,
        zeros=zeros / (rows * cols),
        kurtosis=excess_kurtosis([math.fsum(column) for column in zip(*sums, strict=True)], rows * cols),
        outputs=outputs,
        inputs=inputs,
        losses=losses,
        recommended=recommend(losses, tolerance_db),
    )


def recommend(losses: Sequence[MatrixLoss], tolerance_db: float = TOLERANCE_DB) -> dict[str, str]:
    """For each format the coarsest granularity that loses less than `tolerance_db` against the best.

    Coarser means fewer bits per weight (of equals, the one listed first). Per input channel is left out.
    """
    chosen: dict[str, str] = {}
    for format in FORMATS:
        candidates = [x for x in losses if x.format == format and x.granularity in RECOMMENDABLE]
        best = max((x.sqnr_db for x in candidates), default=0.0)
        for x in sorted(candidates, key=lambda x: x.bits_per_weight):
            if x.sqnr_db == best or x.sqnr_db > best - tolerance_db:
                chosen[format] = x.granularity
                break
    return chosen


def _bands(rows: int, cols: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Row ranges: all rows, or evenly spaced bands of 128 that have at least `wanted`; joined up to a chunk's size.

    Every range but the last begins and ends at a multiple of 128, so that blocks of 128 are the matrix's own.
    """
    count, need = math.ceil(rows / _BAND), math.ceil(wanted / _BAND)
    picked = [i * count // need for i in range(need)] if need < count else list(range(count))
    limit = max(1, _CHUNK_ELEMENTS // (_BAND * cols))
    start, length = picked[0], 1
    for band in picked[1:]:
        if band == start + length and length < limit:
            length += 1
        else:
            yield start * _BAND, (start + length) * _BAND
            start, length = band, 1
    yield start * _BAND, min(rows, (start + length) * _BAND)


class _Tally:
    """What is added up for one format and granularity."""

    def __init__(self, name: str, format: str, dtype: torch.dtype, extremes: Tensor) -> None:
        self.name = name
        spec = QuantSpec(get_format(format), GRANULARITIES[name])
        self.spec = Scheme(name, spec).for_dtype(dtype).weight
        self.codes = 2**self.spec.format.bits
        self.errors: list[float] = []
        self.spans: list[float] = []
        self.hits: list[float] = []
        self.tiles = 0
        # tiles that reach over all rows have one scale for all bands, which depends on nothing but the extremes
        tall = self.spec.granularity.rows is None
        self.steps = scale_values(choose_scale(extremes, self.spec)[0]) if tall else None
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._elements = 0

    def add(self, x: Tensor) -> None:
        """Round a band of rows, float32."""
        grain = self.spec.granularity
        steps = self.steps if self.steps is not None else scale_values(choose_scale(x, self.spec)[0])
        tiles = to_tiles(x, grain)
        grid = to_grid(tiles, steps, None, self.spec)
        index = (grid - self.spec.low).to(torch.int64)
        outside, first, last = None, grid, grid
        if not grain.divides(tuple(x.shape)):  # what fills up a cut tile is no code
            outside = to_tiles(torch.ones_like(x), grain) == 0
            index = index.masked_fill_(outside, self.codes)
            first, last = grid.masked_fill(outside, math.inf), grid.masked_fill(outside, -math.inf)
        used = torch.zeros(*tiles.shape[:2], self.codes + _WORD, dtype=torch.bool, device=x.device)
        used.scatter_(-1, index, True)
        if outside is not None:
            used[..., self.codes] = False
        seen = used, first.amin(-1), last.amax(-1)
        error = from_grid(grid, steps, None).sub_(tiles).double().square_()
        self.errors.append(_total(row_sums(error)))
        if self.steps is not None:
            self._elements += tiles.shape[-1]
            old = self._seen
            self._seen = (
                seen
                if old is None
                else (old[0] | seen[0], torch.minimum(old[1], seen[1]), torch.maximum(old[2], seen[2]))
            )
        else:
            self._count(*seen, tiles.shape[-1] if outside is None else tiles.shape[-1] - outside.sum(-1))

    def _count(self, used: Tensor, first: Tensor, last: Tensor, sizes: int | Tensor) -> None:
        """Whole tiles [down, across] of `sizes` elements: which codes they use, and the first and the last of these."""
        # eight flags are one word: words are added, their bytes stay below 256
        words = used.view(torch.int64).sum(-1, keepdim=True)
        hit = words.view(torch.uint8).sum(-1).double()
        possible = min(sizes, self.codes) if isinstance(sizes, int) else sizes.clamp(max=self.codes)
        self.hits.append(_total(row_sums(hit / possible)))
        self.spans.append(_total(row_sums(last.double() - first.double())) / (self.codes - 1))
        self.tiles += hit.numel()

    def conclude(self, power: float, shape: tuple[int, int]) -> MatrixLoss:
        if self._seen is not None:
            self._count(*self._seen, self._elements)
        return MatrixLoss(
            granularity=self.name,
            format=self.spec.format.name,
            sqnr_db=sqnr_db(power, math.fsum(self.errors)),
            bits_per_weight=self.spec.count_bits(shape) / math.prod(shape),
            span=math.fsum(self.spans) / self.tiles,
            hit=math.fsum(self.hits) / self.tiles,
        )


def _total(x: Tensor) -> float:
    return math.fsum(x.flatten().tolist())


def _losses(matrix: Tensor, bands: Sequence[tuple[int, int]], extremes: Tensor) -> tuple[MatrixLoss, ...]:
    tallies = [_Tally(name, format, matrix.dtype, extremes) for format in FORMATS for name in GRANULARITIES]
    powers: list[float] = []
    for start, stop in bands:
        x = matrix[start:stop].to(torch.float32).contiguous()
        powers.append(_total(row_sums(x.double().square_())))
        for tally in tallies:
            tally.add(x)
    shape = (matrix.shape[0], matrix.shape[1])
    return tuple(tally.conclude(math.fsum(powers), shape) for tally in tallies)


# --- Many matrices -----------------------------------------------------------------------------------------------


def worst_of(parts: Sequence[LayerInspection], tolerance_db: float) -> LayerInspection:
    """One layer out of the matrices of its experts."""
    if len(parts) == 1:
        return parts[0]
    nonfinite = sum(part.nonfinite for part in parts)
    healthy = [(i, part) for i, part in enumerate(parts) if part.losses]
    if not healthy:
        return replace(parts[0], matrices=len(parts), nonfinite=nonfinite)
    sound = [part for _, part in healthy]
    losses = tuple(
        replace(
            min(same, key=lambda x: x.sqnr_db),
            span=math.fsum(x.span for x in same) / len(same),
            hit=math.fsum(x.hit for x in same) / len(same),
        )
        for same in zip(*(part.losses for part in sound), strict=True)
    )
    return replace(
        sound[0],
        matrices=len(parts),
        nonfinite=nonfinite,
        absmax=max(finite_numbers(part.absmax for part in sound)),
        zeros=max(finite_numbers(part.zeros for part in sound)),
        kurtosis=max(finite_numbers(part.kurtosis for part in sound), default=None),
        outputs=_worst_channels([part.outputs for part in sound if part.outputs]),
        inputs=_worst_channels([part.inputs for part in sound if part.inputs]),
        losses=losses,
        recommended=recommend(losses, tolerance_db),
        worst_matrix=min(healthy, key=lambda pair: pair[1].sqnr(*SENSITIVITY) or 0.0)[0],
    )


def _worst_channels(ranges: Sequence[ChannelRanges]) -> ChannelRanges:
    """The expert with the largest ratio; outliers and dead channels are those of all."""
    worst = max(ranges, key=lambda x: x.ratio or 0.0)
    return replace(worst, outliers=sum(x.outliers for x in ranges), dead=sum(x.dead for x in ranges))


def finite_numbers(values: Any) -> list[float]:
    return [value for value in values if value is not None]
