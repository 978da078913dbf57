"""Which ways of storing a layer a search may choose from, for each engine: data, and one function that reads it.

What engines load is told in `bitgrain.pipeline.engine_rules`, by which the result is judged; what is listed here is
within that. A bit more or less costs about four times the error, a group half as large saves about a tenth:
groups are the small change with which a budget is filled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.formats import FP32, Format
from bitgrain.numerics.gguf_types import GGUF_TYPES, fits_gguf
from bitgrain.numerics.granularity import matrix_shape
from bitgrain.numerics.spec import int_weight

WHOLE_ROW = 0
"""In a list of group sizes: one scale for each output channel."""


@dataclass(frozen=True)
class Kinds:
    """Integer weights: each of `bits` with each of `groups`, with zero points or without.

    out_multiple, in_multiple   what the layer's sizes must be divisible by
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    asymmetric: bool
    out_multiple: int = 1
    in_multiple: int = 1


_GROUPS = (32, 64, 128, WHOLE_ROW)
_SERVING = (
    Kinds((4,), _GROUPS, True, out_multiple=64, in_multiple=128),
    Kinds((8,), _GROUPS, False),
)
ENGINES: dict[str, tuple[Kinds, ...]] = {
    # whatever compressed-tensors can hold
    "compressed-tensors": (Kinds((2, 3, 4, 5, 6, 7, 8), _GROUPS, True),),
    "vllm": _SERVING,
    # it does not pad layers of 8 bits either
    "sglang": tuple(replace(kinds, out_multiple=64, in_multiple=128) for kinds in _SERVING),
    # it does not load packed zero points beside another scheme
    "transformers": (Kinds((2, 3, 4, 5, 6, 7, 8), _GROUPS, False),),
}
GGUF_ENGINES = ("llama.cpp", "gguf")
"""What loads GGUF files: any of their types, in blocks of 32 or 256 weights."""
_NO_EMBEDDINGS = ("vllm", "sglang", "transformers")


def candidate_specs(
    engine: str,
    shape: Sequence[int],
    *,
    around: float | None = None,
    scale: Format = FP32,
    role: str = "linear",
) -> list[QuantSpec]:
    """What a weight of `shape` [.., out, in] may be stored as for `engine`, by rising size.

    around  the average that is aimed at: only formats from two bits below to two above it are worth the time to try
    scale   storage of the scales (the checkpoint's dtype), where the engine does not prescribe it (GGUF does)
    role    of the layer; most engines read no quantized embeddings
    Groups that do not divide the inputs are left out; the list may be empty. Raises SchemeError for an unknown engine.
    """
    if engine.lower() in GGUF_ENGINES:
        fitting = [s for s in GGUF_TYPES.values() if fits_gguf(s, tuple(shape)) and _is_near(s.format.bits, around)]
        return sorted(fitting, key=lambda spec: spec.count_bits(tuple(shape)))
    kinds = ENGINES.get(engine.lower())
    if kinds is None:
        raise SchemeError(f"unknown engine {engine!r}; --bits knows {', '.join((*ENGINES, *GGUF_ENGINES))}")
    if role == "embedding" and engine.lower() in _NO_EMBEDDINGS:
        return []
    rows, cols = matrix_shape(tuple(shape))
    rows = shape[-2] if len(shape) > 1 else rows
    found = [
        int_weight(bits, group or None, asymmetric=kind.asymmetric, scale=scale)
        for kind in kinds
        if rows % kind.out_multiple == 0 and cols % kind.in_multiple == 0
        for bits, group in product(kind.bits, kind.groups)
        if _is_near(bits, around) and (group == WHOLE_ROW or (group < cols and cols % group == 0))
    ]
    return sorted(found, key=lambda spec: spec.count_bits(tuple(shape)))


def _is_near(bits: int, around: float | None) -> bool:
    return around is None or math.floor(around) - 2 <= bits <= math.ceil(around) + 2
