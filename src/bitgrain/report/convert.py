"""What a conversion did, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.converted import Converted
from bitgrain.report.tables import say


def render_converted(result: Converted, console: Console) -> None:
    """Print a few lines."""
    say(console, f"{result.out}: {len(result.layers)} layers, {format_bytes(result.nbytes)}, {result.layout} layout")
    for (before, after), count in Counter((before, after) for _, before, after in result.changed).items():
        say(console, f"{count} layers said otherwise, with the same numbers: {before} -> {after}", "dim")
    for note in result.notes:
        say(console, f"note: {note}")


def converted_to_json(result: Converted) -> dict[str, Any]:
    """The same as data."""
    return {
        "out": str(result.out),
        "layout": result.layout,
        "bytes": result.nbytes,
        "layers": {name: layer.scheme.weight.describe() for name, layer in result.layers.items()},
        "changed": [list(one) for one in result.changed],
        "notes": list(result.notes),
    }
