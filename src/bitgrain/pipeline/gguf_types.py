"""Which of GGUF's block types have a layer's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from bitgrain.checkpoints.gguf.architectures import architecture_of_model
from bitgrain.checkpoints.gguf.blocks import BlockType, stored_spec
from bitgrain.checkpoints.gguf.config import metadata_of
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES, type_for
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import ModelError, SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import plan_respelling, respell

_SAMPLE_TILES = 8


def candidates(layer: StoredLayer, wanted: BlockType | None) -> Iterable[BlockType]:
    """Types that may hold the layer's numbers, the smallest first."""
    if wanted is not None:
        return [wanted]
    spec = layer.scheme.weight
    own = BLOCK_TYPES.get(layer.scheme.name)
    own = type_for(spec) if own is None or own.spec != spec else own
    found = [one for one in BLOCK_TYPES.values() if one.spec is not None and _may_hold(one.spec, spec)]
    found.sort(key=lambda one: one.block_bytes / one.block_size)
    return dict.fromkeys([own, *found]) if own is not None else found


def _may_hold(mine: QuantSpec, theirs: QuantSpec) -> bool:
    if isinstance(mine.scale, QuantSpec) and not isinstance(theirs.scale, QuantSpec):
        return False
    wide, narrow = mine.format, theirs.format
    return wide == narrow or (
        isinstance(wide, IntFormat) and isinstance(narrow, IntFormat) and wide.bits >= narrow.bits
    )


def refusal(layer: StoredLayer, matrices: Callable[[], Iterable[PackedMatrix]], candidate: BlockType) -> str | None:
    """Why a layer with these matrices cannot be of that type with the same numbers, or None."""
    assert candidate.spec is not None
    same = layer.scheme.weight == candidate.spec and candidate.largest_scale is None
    try:
        candidate.row_bytes(layer.in_features)
        for packed in () if same else matrices():
            how = plan_respelling(packed, candidate.spec)
            candidate.check_scales(how.scale)
            if not how.proven:
                respell(packed.unpack(), candidate.spec, torch.float32)
    except SchemeError as error:
        return f"{layer.module}: as {candidate.name}: {error}"
    return None


def choose_type(
    layer: StoredLayer, wanted: BlockType | None, refused: Callable[[BlockType], str | None]
) -> BlockType | str:
    """The first of the candidates that is not refused; or why there is none."""
    reasons: list[str] = []
    for candidate in candidates(layer, wanted):
        reason = refused(candidate)
        if reason is None:
            return candidate
        reasons.append(reason)
    if reasons:
        return reasons[0]
    return f"{layer.module}: no type of GGUF has the numbers of {layer.scheme.weight.describe()}"


def gguf_problems(layers: Iterable[StoredLayer], config: Mapping[str, Any], wanted: BlockType | None) -> list[str]:
    """What is known to be in the way of a GGUF file before layers are quantized: an architecture that llama.cpp does
    not have, and schemes whose numbers no block type holds, found out on random weights."""
    found: list[str] = []
    try:
        metadata_of(config, architecture_of_model(config))
    except ModelError as error:
        found.append(str(error))
    reasons: dict[tuple[QuantSpec, int], str | None] = {}
    for layer in layers if wanted is None or wanted.spec is not None else ():
        key = layer.scheme.weight, layer.in_features
        if key not in reasons:
            reasons[key] = _planned_refusal(layer, wanted)
        if (reason := reasons[key]) is not None:
            found.append(f"{reason} (schemes for GGUF are those with names that begin with GGUF_)")
    return list(dict.fromkeys(found))


def _planned_refusal(layer: StoredLayer, wanted: BlockType | None) -> str | None:
    spec = stored_spec(layer.scheme.weight)
    if spec.outliers or spec.columns:
        return f"{layer.module}: GGUF has no place for {'outliers' if spec.outliers else 'columns in 16 bits'}"
    rows = min(layer.out_features, (spec.granularity.rows or 1) * _SAMPLE_TILES)
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(rows, layer.in_features, generator=draw) + torch.randn(rows, 1, generator=draw)
    sample = [PackedMatrix.of(quantize(values, spec))]
    chosen = choose_type(layer, wanted, lambda candidate: refusal(layer, lambda: sample, candidate))
    return chosen if isinstance(chosen, str) else None
