"""What a finished fine-tuning says."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.finetune import Finetuned
from bitgrain.report.tables import command, count_text, duration_text, facts, say

__all__ = ["finetuned_to_json", "render_finetuned"]


def render_finetuned(found: Finetuned, seconds: float, console: Console, model: str, out: str) -> None:
    """Print the summary; `model` and `out` as the user wrote them, for the commands to run next."""
    say(console)
    say(console, f"{out} is written, in {duration_text(seconds)}", "bold")
    held, dense = format_bytes(found.base_nbytes), format_bytes(found.dense_nbytes)
    facts(
        console,
        [
            (
                "loss",
                f"{found.before:.4f} before, {found.after:.4f} after {len(found.losses)} steps (validation)",
            ),
            ("trained", f"{count_text(found.trained)} parameters"),
            ("base", f"{held} in memory, {count_text(found.packed)} weights of it packed; dense it would be {dense}"),
        ],
    )
    say(console)
    say(console, "next", "bold")
    command(console, f"bitgrain merge {shlex.quote(model)} {shlex.quote(out)} -o MODEL")


def finetuned_to_json(found: Finetuned, seconds: float) -> dict[str, Any]:
    """The summary for programs."""
    return {
        "out": str(found.out),
        "seconds": seconds,
        "steps": len(found.losses),
        "loss_before": found.before,
        "loss_after": found.after,
        "losses": list(found.losses),
        "trained_parameters": found.trained,
        "packed_weights": found.packed,
        "base_bytes": found.base_nbytes,
        "dense_bytes": found.dense_nbytes,
    }
