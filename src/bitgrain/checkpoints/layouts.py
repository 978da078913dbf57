"""Every layout of safetensors folders, by name; and which one a folder is in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from bitgrain.checkpoints.awq import AWQ
from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.bitsandbytes import Bitsandbytes4Bit, BitsandbytesInt8
from bitgrain.checkpoints.bitsandbytes_reader import FP4, NF4
from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.gptq import GPTQ
from bitgrain.checkpoints.layout import Layout
from bitgrain.checkpoints.mlx import MLX
from bitgrain.checkpoints.torchao import READ_ONLY, TorchAO
from bitgrain.errors import SchemeError

_ALL: tuple[Layout, ...] = (
    CompressedTensors(),
    BitgrainLayout(),
    GPTQ(1),
    GPTQ(2),
    AWQ(),
    Bitsandbytes4Bit("bnb-nf4", NF4, "transformers with bitsandbytes: NF4, double quantized or not"),
    Bitsandbytes4Bit("bnb-fp4", FP4, "transformers with bitsandbytes: its FP4, double quantized or not"),
    BitsandbytesInt8(),
    MLX(),
    TorchAO(),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ALL}
WRITABLE: dict[str, Layout] = {name: layout for name, layout in LAYOUTS.items() if not isinstance(layout, TorchAO)}


def get_layout(name: str, others: Sequence[str] = ()) -> Layout:
    """The layout called `name`, to be written. Raises SchemeError that lists all, and `others` that the caller knows,
    or for one that is only read."""
    found = WRITABLE.get(name.lower())
    if found is None:
        if name.lower() in LAYOUTS:
            raise SchemeError(READ_ONLY)
        known = [*WRITABLE, *others]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SchemeError(f"unknown layout {name!r}: {hint}known layouts: {', '.join(known)}")
    return found


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a checkpoint with this config.json; None for one that is not quantized, or in a way not known."""
    return next((layout for layout in LAYOUTS.values() if layout.recognises(config)), None)
