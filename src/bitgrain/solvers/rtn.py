"""Round to nearest: every weight becomes the code nearest to it, under the scale that the spec's range chose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..numerics import QTensor, QuantSpec, choose_scale, per_tensor, quantize
from ..numerics.granularity import to_tiles
from ..numerics.quantize import check_finite
from .base import register_solver

# Few enough elements that a piece and its temporaries stay in a core's cache; fixed, so results never depend on it.
_PIECE = 1 << 18


@register_solver("rtn")
class RoundToNearest:
    """Data-free. The baseline that every other solver is measured against."""

    needs_calibration = False

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        *,
        hessian: Tensor | None = None,
        importance: Tensor | None = None,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> QTensor:
        """See `Solver.solve`; `hessian` is not used."""
        rows, cols = weight.shape
        tile_rows, _ = spec.granularity.tile((rows, cols))
        step = max(1, _PIECE // max(1, cols * tile_rows)) * tile_rows
        if step >= rows:
            return quantize(weight, spec, importance=importance, outer_scale=outer_scale, name=name)
        if isinstance(spec.scale, QuantSpec) and outer_scale is None:  # scales are quantized together: all chosen first
            if not has_one_outer_scale(spec):
                return quantize(weight, spec, importance=importance, name=name)
            outer_scale = shared_outer_scale([weight], spec, name, importance)
        pieces = [
            quantize(weight[i : i + step], spec, importance=importance, outer_scale=outer_scale, name=name)
            for i in range(0, rows, step)
        ]
        return _join(pieces, spec)


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
        tile_rows, _ = spec.granularity.tile((rows, cols))
        step = max(1, _PIECE // max(1, cols * tile_rows)) * tile_rows
        for i in range(0, rows, step):
            piece = weight[i : i + step].to(torch.float32)
            check_finite(piece, name)
            weights_of = None if importance is None else to_tiles(importance.expand(piece.shape), spec.granularity)
            scale, _ = spec.range.scale(to_tiles(piece, spec.granularity, spec.range.fill), spec, weights_of)
            largest.append(scale.max().reshape(1, 1))
    stored, _ = choose_scale(torch.cat(largest), spec.scale, name=f"{name} (scales)")
    assert isinstance(stored, Tensor)
    return stored


def _join(pieces: list[QTensor], spec: QuantSpec) -> QTensor:
    """Pieces of whole tile rows, one above the other."""
    scales = [piece.scale for piece in pieces]
    plain = [scale for scale in scales if isinstance(scale, Tensor)]
    nested = [scale for scale in scales if isinstance(scale, QTensor)]
    if nested:
        inner = nested[0].spec
        scale = QTensor(torch.cat([part.codes for part in nested]), nested[0].scale, None, inner)
    else:
        scale = torch.cat([part.view(torch.uint8) for part in plain]).view(plain[0].dtype)
    zeros = [piece.zero for piece in pieces if piece.zero is not None]
    zero = torch.cat(zeros) if zeros else None
    return QTensor(torch.cat([piece.codes for piece in pieces]), scale, zero, spec)
