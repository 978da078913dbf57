"""What every job does with one quantized layer: its matrices, the scales that fused layers share, its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.numerics import QTensor
from bitgrain.numerics.measures import ErrorReport, row_errors, summarize
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import check_finite
from bitgrain.solvers.rtn import has_one_outer_scale, shared_outer_scale

LOW_SQNR_DB = 5.0
"""A layer below this has lost most of its information; the manifest warns."""
_PIECE = 1 << 18
"""Elements that are widened to float32 or float64 at once. No result depends on it."""


def matrices(tensor: Tensor, layer: StoredLayer) -> Iterator[Tensor]:
    """The [out, in] matrices of an original tensor, one at a time."""
    for matrix in tensor if layer.experts > 1 else (tensor,):
        matrix = matrix.reshape(layer.shape) if layer.original else matrix
        yield matrix.T.contiguous() if layer.transposed else matrix


def kept(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor that is copied. Raises NumericsError for NaN or Inf."""
    tensor = checkpoint.read(name)
    if tensor.is_floating_point() and not all(
        bool(torch.isfinite(piece.float().sum()).item()) for piece in tensor.reshape(-1).split(_PIECE)
    ):
        check_finite(tensor.float(), name)
    return tensor


def outer_scales(
    layers: Mapping[str, StoredLayer],
    fused_groups: Mapping[str, str],
    read: Callable[[str], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """For nested scales, the scale of the scales of each fused group: engines join its members under one.

    layers  by the names of their tensors; fused_groups: tensor -> its group; read: the weights as they are rounded
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        group = fused_groups.get(name)
        if group and layer.experts == 1 and has_one_outer_scale(layer.scheme.weight):
            groups.setdefault((group, repr(layer.scheme)), []).append(name)
    found: dict[str, Tensor] = {}
    for members in groups.values():
        if len(members) < 2:
            continue
        weights = (next(matrices(read(name), layers[name])).to(device) for name in members)
        shared = shared_outer_scale(weights, layers[members[0]].scheme.weight, " + ".join(members))
        found.update(dict.fromkeys(members, shared))
    return found


def to_cpu(q: QTensor) -> QTensor:
    """The same on the CPU."""
    outliers = None if q.outliers is None else q.outliers.to("cpu")
    columns = None if q.columns is None else q.columns.to("cpu")
    offset = None if q.offset is None else _stored_to_cpu(q.offset)
    more = {"outliers": outliers, "columns": columns, "order": None if q.order is None else q.order.cpu()}
    return QTensor.of(q.codes.cpu(), _stored_to_cpu(q.scale), offset, q.spec, **more)


def _stored_to_cpu(stored: Tensor | QTensor) -> Tensor | QTensor:
    return to_cpu(stored) if isinstance(stored, QTensor) else stored.cpu()


def report(matrix: Tensor, q: QTensor) -> dict[str, Any]:
    """The errors of one matrix as JSON; an exact result has no SQNR."""
    report = measure_in_pieces(matrix, q)
    exact = not math.isfinite(report.sqnr_db)
    return {
        "sqnr_db": None if exact else report.sqnr_db,
        "cosine": report.cosine,
        "mse": report.mse,
        "max_error": report.max_error,
    }


def measure_in_pieces(matrix: Tensor, q: QTensor) -> ErrorReport:
    """`numerics.measures.measure` of one matrix, to the bit, without a widened copy of the whole."""
    return summarize([row_errors(x, part.dequantize()) for x, part in _row_pieces(matrix, q)], matrix.numel())


def _row_pieces(matrix: Tensor, q: QTensor) -> Iterator[tuple[Tensor, QTensor]]:
    """Some rows of both at a time: what they are widened to stays in a core's cache."""
    tile_rows = q.spec.granularity.rows  # None: a tile spans all rows, and so it spans any rows
    rows, cols = matrix.shape
    step = max(1, _PIECE // (cols * (tile_rows or 1))) * (tile_rows or 1)
    scale, offsets = scale_values(q.scale), None if q.offset is None else scale_values(q.offset)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tiles = slice(None) if tile_rows is None else slice(start // tile_rows, -(-stop // tile_rows))
        offset = None if offsets is None else offsets[tiles]
        outliers = None if q.outliers is None else q.outliers.rows(start, stop)
        columns = None if q.columns is None else q.columns.rows(start, stop)
        more = {"outliers": outliers, "columns": columns, "order": q.order}
        yield matrix[start:stop], QTensor.of(q.codes[start:stop], scale[tiles], offset, q.spec, **more)


def record(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One record for a layer: of stacked experts the worst figure of each kind."""
    worst: dict[str, Any] = {}
    figures = list(reports)
    for key in figures[0]:
        values = [one[key] for one in figures if one[key] is not None]
        worst[key] = (max if key in ("mse", "max_error") else min)(values, default=None)
    warnings: list[str] = []
    if worst["sqnr_db"] is not None and worst["sqnr_db"] < LOW_SQNR_DB:
        warnings.append(f"SQNR is only {worst['sqnr_db']:.1f} dB")
    return {**worst, "warnings": warnings}
