"""The registry of GGUF's block types: one line for each family. A new type is one entry in a family's file."""

from __future__ import annotations

import torch

from bitgrain.checkpoints.gguf import k_quants, legacy, tables, ternary
from bitgrain.checkpoints.gguf.blocks import BlockType, stored_spec
from bitgrain.checkpoints.gguf.storage import STORAGES
from bitgrain.errors import SchemeError
from bitgrain.numerics.spec import QuantSpec

_PLAIN = (
    BlockType(STORAGES["F32"], dtype=torch.float32),
    BlockType(STORAGES["F16"], dtype=torch.float16),
    BlockType(STORAGES["BF16"], dtype=torch.bfloat16),
)
BLOCK_TYPES: dict[str, BlockType] = {
    block_type.name: block_type
    for block_type in (*_PLAIN, *legacy.TYPES, *k_quants.TYPES, *tables.TYPES, *ternary.TYPES)
}


def get_type(name: str) -> BlockType:
    """A block type by name (case-insensitive). Raises SchemeError for a name that has none, listing all."""
    found = BLOCK_TYPES.get(name.upper())
    if found is None:
        raise SchemeError(f"GGUF type {name!r} cannot be read or written here; known: {', '.join(BLOCK_TYPES)}")
    return found


def spec_of(name: str) -> QuantSpec | None:
    """What the numbers of a type are; None for plain floats. Raises SchemeError as `get_type`."""
    return get_type(name).spec


def type_for(spec: QuantSpec) -> BlockType | None:
    """The type that holds tensors of `spec` as they are (of two, the first); None without one."""
    wanted = stored_spec(spec)
    return next((found for found in BLOCK_TYPES.values() if found.spec == wanted), None)
