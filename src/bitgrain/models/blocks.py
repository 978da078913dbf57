"""The repeated blocks of a model: the unit in which it is read, solved and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def find_blocks(skeleton: nn.Module, matrices: Collection[str]) -> tuple[str, ...]:
    """Dotted paths of the transformer blocks in order, stack after stack (vision, encoder, decoder).

    A stack is a ModuleList not nested in another stack, whose entries are modules that hold at least one of
    `matrices` (names of parameters) somewhere below them. A list of bare linears is no stack.
    """
    blocks: list[str] = []
    for path, module in skeleton.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{block}.") for block in blocks):
            continue
        entries = dict(module.named_children())
        if entries and all(
            next(entry.children(), None) is not None and _holds(f"{path}.{key}.", matrices)
            for key, entry in entries.items()
        ):
            blocks += [f"{path}.{key}" for key in entries]
    return tuple(blocks)


def _holds(prefix: str, matrices: Collection[str]) -> bool:
    return any(name.startswith(prefix) for name in matrices)


def block_index(name: str, index_of: Mapping[str, int]) -> int | None:
    """The index of the block that owns a name in memory; `index_of`: path of a block -> its index."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (index := index_of.get(".".join(parts[:end]))) is not None:
            return index
    return None
