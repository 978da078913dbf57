"""The contents of a checkpoint, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.contents import Contents, StoredTensor
from bitgrain.report.names import Group, group_names
from bitgrain.report.tables import count_text, facts, new_table, say, show, table_row

__all__ = ["contents_to_json", "render_contents"]


def render_contents(found: Contents, console: Console, *, all_layers: bool = False) -> None:
    """Print a few facts and a table; tensors that differ in their numbers only are one line, unless `all_layers`."""
    elements = sum(tensor.elements for tensor in found.tensors)
    say(console, f"{found.name}: {count_text(elements)} parameters, {format_bytes(found.nbytes)} of tensors", "bold")
    say(console)
    rows = [("layout", "not quantized" if found.layout == "none" else found.layout)]
    if found.bits_per_weight is not None:
        rows.append(("bits per weight", f"{found.bits_per_weight:.3f} in quantized layers, scales included"))
    rows.append(("bits per parameter", f"{found.bits_per_parameter:.3f} over the whole model"))
    if found.kv_cache is not None:
        rows.append(("kv cache", found.kv_cache))
    facts(console, rows)
    say(console)
    table = new_table(console, "tensors", "n", "shape", "bits", "stored as", right=("n", "bits"))
    keys = [(tensor.name.removesuffix(".weight"), _key(tensor)) for tensor in found.tensors]
    for group in [Group(name, 1, key) for name, key in keys] if all_layers else group_names(keys):
        shape, bits, words, quantized = group.key
        table_row(table, group.name, str(group.count), shape, bits, words, style="" if quantized else "dim")
    show(console, table)


def contents_to_json(found: Contents) -> dict[str, Any]:
    """The same as data, tensor by tensor."""
    return {
        "name": found.name,
        "layout": found.layout,
        "bytes": found.nbytes,
        "bits_per_weight": found.bits_per_weight,
        "bits_per_parameter": found.bits_per_parameter,
        "kv_cache": found.kv_cache,
        "tensors": [{**asdict(tensor), "bits": tensor.bits} for tensor in found.tensors],
    }


def _key(tensor: StoredTensor) -> tuple[str, str, str, bool]:
    words = tensor.weight if tensor.input is None else f"{tensor.weight}; inputs {tensor.input}"
    return "x".join(map(str, tensor.shape)) or "scalar", f"{tensor.bits:.3f}", words, tensor.quantized
