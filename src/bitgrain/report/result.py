"""What a finished quantization says: sizes, time, the layers that lost most, warnings, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.layers import LOW_SQNR_DB
from bitgrain.pipeline.quantize import QuantizeResult
from bitgrain.report.names import few_names
from bitgrain.report.tables import command, duration_text, facts, percent_text, say

__all__ = ["render_result", "result_to_json", "warning_lines"]

WORST = 3


def render_result(result: QuantizeResult, seconds: float, console: Console, *, model: str, out: str) -> None:
    """Print the summary; `model` and `out` as the user wrote them, for the commands to run next."""
    manifest = result.manifest
    before, after = manifest["bytes_before"], manifest["bytes_after"]
    worst = [f"{layer['sqnr_db']:.1f} dB  {layer['tensor']}" for layer in worst_layers(result)]
    say(console)
    say(console, f"{out} is written, in {duration_text(seconds)}", "bold")
    facts(
        console,
        [
            ("size", f"{format_bytes(after)}, {percent_text(after / before)} of {format_bytes(before)}"),
            (
                "bits",
                f"{manifest['bits_per_weight']:.3f} per weight in quantized layers, "
                f"{manifest['bits_per_parameter']:.3f} per parameter of the model",
            ),
            *_training_facts(manifest.get("training")),
            *((("lowest SQNR" if i == 0 else ""), line) for i, line in enumerate(worst)),
        ],
    )
    for line in warning_lines(result):
        say(console, f"warning: {line}", "yellow", indent="  ")
    target, source = shlex.quote(out), shlex.quote(model)
    say(console)
    say(console, "next", "bold")
    command(console, f"bitgrain verify {target} --against {source}")
    command(console, f"bitgrain eval {target} --against {source} --text FILE")


def _training_facts(told: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if told is None or "best_loss" not in told:
        return []
    first, best = told["first_loss"], told["best_loss"]
    return [("training", f"loss {first:.5f} -> {best:.5f} on text held back, after {told['best_step']} steps")]


def worst_layers(result: QuantizeResult) -> list[dict[str, Any]]:
    """The few layers of lowest signal-to-quantization-noise ratio, as the manifest has them; exact ones are none."""
    known = [layer for layer in result.manifest["layers"] if layer["scheme"] and layer["sqnr_db"] is not None]
    return sorted(known, key=lambda layer: layer["sqnr_db"])[:WORST]


def warning_lines(result: QuantizeResult) -> list[str]:
    """The manifest's warnings of layers, those of low SQNR, of which there can be hundreds, in one line; and what is to
    be noted since the plan was shown."""
    found = [(layer["tensor"], text) for layer in result.manifest["layers"] for text in layer.get("warnings", ())]
    low = [name for name, text in found if text.startswith("SQNR is only")]
    lines = [f"{name}: {text}" for name, text in found if not text.startswith("SQNR is only")]
    if low:
        layers = "1 layer has" if len(low) == 1 else f"{len(low)} layers have"
        lines.append(f"{layers} an SQNR below {LOW_SQNR_DB:g} dB: {few_names(low)}")
    return lines + [note for note in result.manifest["notes"] if note not in result.plan.notes]


def result_to_json(result: QuantizeResult, seconds: float) -> dict[str, Any]:
    """The summary for programs; everything else is in OUT/manifest.json."""
    manifest = result.manifest
    keys = (
        *("model", "architecture", "layout", "parameters", "coverage", "bytes_before", "bytes_after"),
        *("bits_per_weight", "bits_per_parameter", "solver", "engines", "notes"),
    )
    return {
        "out": str(result.out),
        "seconds": seconds,
        **{key: manifest[key] for key in keys},
        "worst_layers": [
            {key: layer[key] for key in ("tensor", "scheme", "sqnr_db")} for layer in worst_layers(result)
        ],
        "warnings": warning_lines(result),
    }
