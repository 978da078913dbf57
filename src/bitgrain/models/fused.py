"""Which linears engines join into one matrix multiplication, so that they must share a scheme.

Two sources. Tensors on disk that transformers itself concatenates (the w1 and w3 of an expert) are fused by that
rule. For separate modules, names are a hint, and only together with structure: siblings in one module, with the
same number of inputs. Nothing here says that they read the same input: cross-attention's q does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# The conventional names of the parts. A group needs two different parts.
_PARTS = {
    "qkv": re.compile(r"^(?:to_|w)?(q|k|v|query|key|value)(?:_?(?:proj|lin|linear|layer))?$"),
    "gate_up": re.compile(r"^(?:(gate|up)(?:_?(?:proj|linear))?|w([13])|wi_([01]))$"),
    "qkv_a": re.compile(r"^(q|kv)_a_proj(?:_with_mqa)?$"),
}


def part_of(leaf: str) -> tuple[str, str] | None:
    """("qkv", "q") for "q_proj"; None for a module that no engine fuses."""
    for group, pattern in _PARTS.items():
        if match := pattern.match(leaf):
            return group, next(part for part in match.groups() if part)
    return None


def sibling_groups(members: Iterable[tuple[str, str, int]]) -> list[list[str]]:
    """Names to fuse, group by group. `members`: (name, module path in memory, inputs) of linears."""
    groups: dict[tuple[str, str, int], dict[str, str]] = defaultdict(dict)
    for name, module, inputs in members:
        parent, _, leaf = module.rpartition(".")
        if (found := part_of(leaf)) is not None:
            group, part = found
            groups[parent, group, inputs].setdefault(part, name)
    return [list(parts.values()) for parts in groups.values() if len(parts) > 1]


def group_id(modules: Iterable[str]) -> str:
    """ "model.layers.0.self_attn.qkv" for the modules q_proj, k_proj, v_proj of that attention."""
    split = [module.split(".") for module in modules]
    common = []
    for column in zip(*split):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    leaf = split[0][len(common)] if len(common) < len(split[0]) else "fused"
    found = part_of(leaf)
    return ".".join([*common, found[0] if found else "fused"])
