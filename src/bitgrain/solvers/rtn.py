"""Round to nearest: every weight becomes the code nearest to it, under the scale that the spec's range chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.numerics import QTensor, QuantSpec, choose_scale, per_tensor, quantize
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import check_finite, store_offset, store_scale
from bitgrain.numerics.ranges import MinMax
from bitgrain.solvers.base import Moments, Solution, register_solver

# Few enough elements that a piece and its temporaries stay in a core's cache; fixed, so results never depend on it.
_PIECE = 1 << 18


@register_solver("rtn")
@dataclass(frozen=True)
class RoundToNearest:
    """Data-free. The baseline that every other solver is measured against."""

    needs_calibration: ClassVar[bool] = False

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`; of `moments` only the importance, for the ranges that use it."""
        importance = None if moments is None else moments.importance
        return Solution(self.round(weight, spec, importance, outer_scale=outer_scale, name=name), "rtn")

    def round(
        self,
        weight: Tensor,
        spec: QuantSpec,
        importance: Tensor | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> QTensor:
        """The same, of which only the QTensor; `importance` [in] or [out, in]."""
        rows, cols = weight.shape
        step = _piece_rows(rows, cols, spec)
        if step >= rows or spec.outliers:  # outliers are sought in the whole matrix
            return quantize(weight, spec, importance=importance, outer_scale=outer_scale, name=name)
        codes = torch.empty((rows, cols), dtype=spec.format.code_dtype, device=weight.device)
        nested = isinstance(spec.scale, QuantSpec) and outer_scale is None and not _by_row(spec.scale)
        crossing = isinstance(spec.minimum, QuantSpec) and not _by_row(spec.minimum)
        if spec.granularity.rows is None or crossing or (nested and not has_one_outer_scale(spec)):
            scale, offset = _choose_first(weight, spec, step, importance, outer_scale, name)
            steps, offsets = scale_values(scale), None if offset is None else scale_values(offset)
            for i in range(0, rows, step):
                tiles = _tile_rows(i, min(i + step, rows), spec)
                part = None if offsets is None else offsets[tiles]
                piece = quantize(weight[i : i + step], spec, scale=steps[tiles], zero=part, name=name)
                codes[i : i + step] = piece.codes
            return QTensor.of(codes, scale, offset, spec)
        if nested:
            outer_scale = shared_outer_scale([weight], spec, name, importance)
        scales: list[Tensor | QTensor] = []
        offset_parts: list[Tensor | QTensor] = []
        for i in range(0, rows, step):
            weights = None if importance is None else importance.expand(rows, cols)[i : i + step]
            piece = quantize(weight[i : i + step], spec, importance=weights, outer_scale=outer_scale, name=name)
            codes[i : i + step] = piece.codes
            scales.append(piece.scale)
            offset_parts += [] if piece.offset is None else [piece.offset]
        return QTensor.of(codes, join_scales(scales), join_scales(offset_parts) if offset_parts else None, spec)


def round_without_tokens(
    weight: Tensor, spec: QuantSpec, *, outer_scale: Tensor | None = None, name: str = "weight"
) -> Solution:
    """What a solver that learns from inputs does with a layer that calibration sent none."""
    q = RoundToNearest().round(weight, spec, outer_scale=outer_scale, name=name)
    return Solution(q, "rtn", notes=("calibration sent it no tokens: rounded to nearest",))


def _piece_rows(rows: int, cols: int, spec: QuantSpec) -> int:
    """How many rows are rounded at once: whole tiles, or any rows where one tile spans them all."""
    tile_rows = spec.granularity.rows or 1
    return max(1, _PIECE // max(1, cols * tile_rows)) * tile_rows


def _by_row(nested: QuantSpec) -> bool:
    """Whether each row of nested scales stands for itself, so that rows can be quantized apart."""
    return nested.granularity.rows == 1 and nested.granularity.run is None


def _tile_rows(start: int, stop: int, spec: QuantSpec) -> slice:
    """The rows of tiles in which the weight's rows from `start` (where a tile begins) to `stop` lie."""
    tile_rows = spec.granularity.rows
    return slice(None) if tile_rows is None else slice(start // tile_rows, -(-stop // tile_rows))


def _extremes(weight: Tensor, by_column: bool, name: str) -> Tensor:
    """The least and the largest of all, [2, 1], or of each column, [2, in]: all that min-max limits look at.

    Raises NumericsError for NaN or Inf.
    """
    if by_column:
        extremes = torch.stack([weight.amin(dim=0), weight.amax(dim=0)])
    else:
        extremes = torch.stack(torch.aminmax(weight)).reshape(2, 1)
    if not bool(torch.isfinite(extremes).all().item()):
        check_finite(weight.to(torch.float32), name)
    return extremes


def _choose_first(
    weight: Tensor, spec: QuantSpec, step: int, importance: Tensor | None, outer_scale: Tensor | None, name: str
) -> tuple[Tensor | QTensor, Tensor | QTensor | None]:
    """`choose_scale` of the whole weight, widened piece by piece where the range allows it."""
    rows, cols = weight.shape
    if spec.granularity.rows is None:
        if type(spec.range) is not MinMax:
            return choose_scale(weight, spec, importance=importance, name=name, outer_scale=outer_scale)
        return choose_scale(
            _extremes(weight, spec.granularity.cols is not None, name), spec, name=name, outer_scale=outer_scale
        )
    ideal: list[Tensor] = []
    offsets: list[Tensor] = []
    for i in range(0, rows, step):
        piece = weight[i : i + step].to(torch.float32)
        check_finite(piece, name)
        weights = (
            None if importance is None else to_tiles(importance.expand(rows, cols)[i : i + step], spec.granularity)
        )
        scale, offset = spec.range.scale(to_tiles(piece, spec.granularity, spec.range.fill), spec, weights)
        ideal.append(scale)
        offsets += [] if offset is None else [offset]
    whole = torch.cat(ideal)
    stored = store_scale(whole, spec, name, outer_scale)
    return stored, store_offset(torch.cat(offsets) if offsets else None, whole, stored, spec, name)


def has_one_outer_scale(spec: QuantSpec) -> bool:
    """Whether the scales of `spec` are nested under a single scale, as in NVFP4."""
    nested = spec.scale
    return isinstance(nested, QuantSpec) and nested.symmetric and nested.granularity == per_tensor()


def shared_outer_scale(
    weights: Iterable[Tensor], spec: QuantSpec, name: str = "weight", importance: Tensor | None = None
) -> Tensor:
    """The scale of the scales that several weights [out, in] can share, stored (see `has_one_outer_scale`).

    Raises NumericsError for NaN or Inf.
    """
    assert isinstance(spec.scale, QuantSpec)
    largest: list[Tensor] = []
    for weight in weights:
        rows, cols = weight.shape
        if type(spec.range) is MinMax and spec.symmetric:  # then the largest scale is that of the extremes
            limits = _extremes(weight, False, name).to(torch.float32)
            scale, _ = spec.range.scale(limits.reshape(1, 1, -1), spec)
            largest.append(scale)
            continue
        step = _piece_rows(rows, cols, spec)
        for i in range(0, rows, step):
            piece = weight[i : i + step].to(torch.float32)
            check_finite(piece, name)
            parts = None if importance is None else importance.expand(rows, cols)[i : i + step]
            weights_of = None if parts is None else to_tiles(parts, spec.granularity)
            scale, _ = spec.range.scale(to_tiles(piece, spec.granularity, spec.range.fill), spec, weights_of)
            largest.append(scale.abs().max().reshape(1, 1))
    stored, _ = choose_scale(torch.cat(largest), spec.scale, name=f"{name} (scales)")
    assert isinstance(stored, Tensor)
    return stored


def join_scales(scales: list[Tensor | QTensor]) -> Tensor | QTensor:
    """The scales (zero points, minima) of pieces of whole tile rows, one above the other.

    Nested ones share their outer scale, or have one for each row.
    """
    first = scales[0]
    if isinstance(first, QTensor):
        parts = [scale for scale in scales if isinstance(scale, QTensor)]
        codes = torch.cat([part.codes for part in parts])
        if not _by_row(first.spec):
            return QTensor(codes, first.scale, None, first.spec)
        zeros = [part.zero for part in parts if part.zero is not None]
        outer = join_scales([part.scale for part in parts])
        return QTensor(codes, outer, torch.cat(zeros) if zeros else None, first.spec)
    # torch cannot join every dtype of scales
    return torch.cat([scale.view(torch.uint8) for scale in scales if isinstance(scale, Tensor)]).view(first.dtype)
