"""What a finished calibration says."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.statistics import Calibrated
from bitgrain.report.tables import command, duration_text, facts, say

__all__ = ["calibrated_to_json", "render_calibrated"]


def render_calibrated(
    found: Calibrated, seconds: float, console: Console, model: str, out: str, *, quiet: bool = False
) -> None:
    """Print the summary (`quiet`: the notes only); `model` and `out` as the user wrote them."""
    if not quiet:
        told = found.about.text
        say(console)
        say(console, f"{out} is written, in {duration_text(seconds)}", "bold")
        facts(
            console,
            [
                ("text", f"{told['windows']} windows of {told['seqlen']} tokens of {', '.join(told['sources'])}"),
                ("layers", str(found.layers)),
                ("size", format_bytes(_size(found))),
            ],
        )
    for note in found.notes:
        say(console, f"note: {note}", "yellow", indent="  ")
    if not quiet:
        say(console)
        say(console, "next", "bold")
        source, target = shlex.quote(model), shlex.quote(out)
        command(console, f"bitgrain quantize {source} --recipe fast --scheme W4A16 --statistics {target} -o OUT")


def calibrated_to_json(found: Calibrated, seconds: float) -> dict[str, Any]:
    """The summary for programs."""
    return {
        "out": str(found.out),
        "seconds": seconds,
        "layers": found.layers,
        "bytes": _size(found),
        "calibration": dict(found.about.text),
        "notes": list(found.notes),
    }


def _size(found: Calibrated) -> int:
    return sum(path.stat().st_size for path in found.out.iterdir())
