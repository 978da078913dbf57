"""Which of GGUF's block types have a layer's numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bitgrain.checkpoints.gguf.blocks import BlockType
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES, type_for
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec
from bitgrain.numerics.respell import plan_respelling, respell
from bitgrain.pipeline.stored_model import StoredModel


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


def refusal(stored: StoredModel, originals: Iterable[str], candidate: BlockType) -> str | None:
    """Why some of these layers cannot be of that type with the same numbers, or None."""
    assert candidate.spec is not None
    for original in originals:
        layer = stored.layers[original]
        try:
            candidate.row_bytes(layer.in_features)
            if layer.scheme.weight == candidate.spec and candidate.largest_scale is None:
                continue
            for packed in stored.packed(original):
                how = plan_respelling(packed, candidate.spec)
                candidate.check_scales(how.scale)
                if not how.proven:
                    respell(packed.unpack(), candidate.spec, torch.float32)
        except SchemeError as error:
            return f"{layer.module}: as {candidate.name}: {error}"
    return None
