"""What the demo found: one row a scheme, and what the numbers say, computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.evaluation.language import Evaluation
from bitgrain.report.evaluation import rise_text
from bitgrain.report.tables import new_table, percent_text, say, table_row

__all__ = ["DemoRow", "frontier", "readings", "render_demo", "row_to_json"]


@dataclass(frozen=True)
class DemoRow:
    """One scheme on the built-in model. `weights`, `granularity`, `inputs`: int4, g128, 16-bit."""

    scheme: str
    weights: str
    granularity: str
    inputs: str
    bits_per_weight: float
    nbytes: int
    seconds: float
    evaluation: Evaluation

    @property
    def kl(self) -> float:
        """Nats per token; it was measured against the original."""
        return math.nan if self.evaluation.kl is None else self.evaluation.kl


def render_demo(rows: Sequence[DemoRow], base_bytes: int, base_perplexity: float, console: Console) -> None:
    """Print the table and what to read from it."""
    heads = ("bits/w", "size", "perplexity", "rise", "KL x1000", "top-1", "time")
    table = new_table(console, "scheme", "weights", "inputs", *heads, right=heads)
    table_row(table, "the original", "bfloat16", "16-bit", "16.000", format_bytes(base_bytes), f"{base_perplexity:.2f}")
    best = {row.scheme for row in frontier(rows)}
    for row in rows:
        found = row.evaluation
        table_row(
            table,
            row.scheme + (" *" if row.scheme in best else ""),
            f"{row.weights} {row.granularity}",
            row.inputs,
            f"{row.bits_per_weight:.3f}",
            format_bytes(row.nbytes),
            f"{found.perplexity:.2f}",
            rise_text(found.perplexity, base_perplexity),
            kl_text(row.kl),
            "" if found.top1 is None else percent_text(found.top1),
            f"{row.seconds:.1f} s",
        )
    console.print(table)
    say(console, "* no scheme with as few bits or fewer is as close to the original by KL divergence", "dim")
    say(console)
    say(console, "what the numbers say", "bold")
    for line in readings(rows, base_perplexity):
        say(console, f"- {line}")


def kl_text(kl: float) -> str:
    """Thousandths of a nat, with two digits at least."""
    value = 1000 * kl
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"


def frontier(rows: Sequence[DemoRow]) -> list[DemoRow]:
    """Rows that no other beats in bits without losing more KL (nor in KL without taking more bits)."""

    def beaten(row: DemoRow) -> bool:
        mine = (row.bits_per_weight, row.kl)
        return any(
            other.bits_per_weight <= mine[0] and other.kl <= mine[1] and (other.bits_per_weight, other.kl) != mine
            for other in rows
        )

    return [row for row in rows if not beaten(row)]


def readings(rows: Sequence[DemoRow], base_perplexity: float) -> list[str]:
    """Comparisons of rows that differ in one thing, as sentences. A row that is not there leaves its sentence out."""
    by_name = {row.scheme: row for row in rows}
    lines: list[str] = []
    for what, coarse, fine in _PAIRS:
        if coarse in by_name and fine in by_name:
            lines.append(_compare(what, by_name[coarse], by_name[fine]))
    widths = [by_name[name] for name in _WIDTHS if name in by_name]
    if len(widths) > 1:
        steps = ", ".join(
            f"{a.weights} to {b.weights} {_factor(b.kl / a.kl)}x" for a, b in zip(widths, widths[1:], strict=False)
        )
        lines.append(f"Fewer bits ({', '.join(row.scheme for row in widths)}) multiply the KL divergence: {steps}.")
    lower = [row.scheme for row in rows if row.evaluation.perplexity < base_perplexity]
    if lower:
        verb = "has" if len(lower) == 1 else "have"
        lines.append(
            f"{', '.join(lower)} {verb} a lower perplexity than the original: that is chance on a short text, not a "
            "gain. KL divergence compares every distribution with the original's and is the measure to trust."
        )
    return lines


_PAIRS = (
    ("int8: one scale per output channel instead of per tensor", "W8A16_TENSOR", "W8A16"),
    ("int4: groups of 128 instead of channels", "W4A16_CHANNEL", "W4A16"),
    ("int4: groups of 32 instead of 128", "W4A16", "INT4_G32"),
    ("int4: a zero point in groups of 128", "W4A16", "W4A16_ASYM"),
    ("2 bits: a zero point and groups of 64", "W2A16", "W2A16_ASYM"),
    ("4-bit floats: NVFP4 (groups of 16, E4M3 scales) instead of MXFP4 (32, powers of two)", "MXFP4A16", "NVFP4A16"),
    ("int8 weights: inputs in 8 bits as well", "W8A16", "W8A8"),
    ("8 bits for both: FP8 instead of integers", "W8A8", "FP8_DYNAMIC"),
)
"""(what is changed, from which scheme, to which)"""
_WIDTHS = ("W8A16", "W4A16", "W3A16", "W2A16")


def _compare(what: str, one: DemoRow, other: DemoRow) -> str:
    """`other` is `one` with a change: what it does to KL, and what it costs."""
    if min(one.kl, other.kl) <= 0 or not math.isfinite(one.kl + other.kl):
        return f"{what}: KL {one.kl:.2g} -> {other.kl:.2g}."
    ratio = one.kl / other.kl
    if 1 / 1.02 < ratio < 1.02:
        effect = "the same KL within 2%"
    elif ratio > 1:
        effect = f"KL {_factor(ratio)}x smaller"
    else:
        effect = f"KL {_factor(1 / ratio)}x larger"
    bits = other.bits_per_weight - one.bits_per_weight
    return f"{what}: {effect}, for {bits:+.3f} bits a weight." if abs(bits) >= 5e-4 else f"{what}: {effect}."


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.095 else f"{ratio:.2f}"


def row_to_json(row: DemoRow) -> dict[str, Any]:
    """The fields by name, the evaluation's among them."""
    fields = asdict(row)
    return {**{key: value for key, value in fields.items() if key != "evaluation"}, **row.evaluation.to_json()}
