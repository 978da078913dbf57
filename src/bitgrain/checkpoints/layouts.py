"""Every layout of safetensors folders, by name; and which one a folder is in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoints.awq import AWQ
from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.gptq import GPTQ
from bitgrain.checkpoints.layout import Layout
from bitgrain.errors import SchemeError

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (CompressedTensors(), BitgrainLayout(), GPTQ(1), GPTQ(2), AWQ())
}


def get_layout(name: str) -> Layout:
    """The layout called `name`. Raises SchemeError that lists all."""
    found = LAYOUTS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SchemeError(f"unknown layout {name!r}: {hint}known layouts: {', '.join(LAYOUTS)}")
    return found


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a checkpoint with this config.json; None for one that is not quantized, or in a way not known."""
    return next((layout for layout in LAYOUTS.values() if layout.recognises(config)), None)
