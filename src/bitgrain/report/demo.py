"""What the demo found: one row a scheme, and what the numbers say, computed from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.evaluation.language import Evaluation
from bitgrain.report.evaluation import rise_text
from bitgrain.report.tables import new_table, percent_text, say, show, table_row

__all__ = ["DemoRow", "frontier", "readings", "render_demo", "row_to_json"]


@dataclass(frozen=True)
class DemoRow:
    """One scheme on the built-in model. weights: `int4`; granularity: `int4 g128`, as the table has it."""

    scheme: str
    weights: str
    granularity: str
    bits_per_weight: float
    nbytes: int
    seconds: float
    evaluation: Evaluation

    @property
    def kl(self) -> float:
        """Nats per token; it was measured against the original."""
        return math.nan if self.evaluation.kl is None else self.evaluation.kl


def render_demo(rows: Sequence[DemoRow], base_bytes: int, base_perplexity: float, console: Console) -> None:
    """Print the table, without sizes and times on a narrow terminal, and what to read from it."""
    narrow = console.width < WIDE
    heads = ["", "scheme", "granularity", "bits/w", "ppl" if narrow else "perplexity", "rise", "KL x1000", "top-1"]
    if not narrow:
        heads = [*heads, "size", "time"]
    table = new_table(console, *heads, right=heads[3:])
    original = ["", "the original", "bfloat16", "16.000", f"{base_perplexity:.2f}", "", "", ""]
    table_row(table, *original, *([] if narrow else [format_bytes(base_bytes), ""]))
    best = {row.scheme for row in frontier(rows)}
    for row in rows:
        found = row.evaluation
        cells = [
            "*" if row.scheme in best else "",
            row.scheme,
            row.granularity,
            f"{row.bits_per_weight:.3f}",
            f"{found.perplexity:.2f}",
            rise_text(found.perplexity, base_perplexity),
            kl_text(row.kl),
            "" if found.top1 is None else percent_text(found.top1),
        ]
        table_row(table, *cells, *([] if narrow else [format_bytes(row.nbytes), f"{row.seconds:.1f} s"]))
    show(console, table)
    for line in _LEGEND:
        say(console, line, "dim", indent="  ")
    say(console)
    say(console, "what these numbers say", "bold")
    for line in readings(rows, base_perplexity):
        say(console, f"- {line}", indent="  ")


WIDE = 97
_LEGEND = (
    "* no other scheme here has both as few bits and as little KL divergence",
    "granularity: the weights that share a scale; /token: inputs too, a scale a token",
    "KL divergence from the original: 1/1000 nat per token. bits/w: in quantized layers, with scales",
)


def kl_text(kl: float) -> str:
    """Thousandths of a nat, with two digits at least."""
    value = 1000 * kl
    return f"{value:.0f}" if value >= 99.5 else f"{value:#.2g}" if value < 9.95 else f"{value:.1f}"


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
        steps = ", ".join(f"x{_factor(b.kl / a.kl)}" for a, b in itertools.pairwise(widths))
        lines.append(f"fewer bits, {' to '.join(row.scheme for row in widths)}: KL {steps}")
    lower = [row.scheme for row in rows if rise_text(row.evaluation.perplexity, base_perplexity).startswith("-")]
    if lower:
        verb = "has" if len(lower) == 1 else "have"
        lines.append(
            f"{', '.join(lower)} {verb} a lower perplexity than the original, by luck: errors can favour a text. KL "
            "divergence compares every prediction with the original's and cannot be lucky"
        )
    return lines


_PAIRS = (
    ("int8, a scale for each channel instead of one for the tensor", "W8A16_TENSOR", "W8A16"),
    ("int4, groups of 128 instead of whole channels", "W4A16_CHANNEL", "W4A16"),
    ("int4, groups of 32 instead of 128", "W4A16", "INT4_G32"),
    ("int4, zero points in groups of 128", "W4A16", "W4A16_ASYM"),
    ("int2, zero points and groups of 64 instead of 128", "W2A16", "W2A16_ASYM"),
    ("NVFP4 instead of MXFP4", "MXFP4A16", "NVFP4A16"),
    ("NVFP4 instead of int4 in groups of 32", "INT4_G32", "NVFP4A16"),
    ("MXFP4 instead of int4 in groups of 128", "W4A16", "MXFP4A16"),
    ("int8, inputs rounded as well", "W8A16", "W8A8"),
    ("8 bits for weights and inputs, FP8 instead of int8", "W8A8", "FP8_DYNAMIC"),
)
"""(what is changed, from which scheme, to which)"""
_WIDTHS = ("W8A16", "W4A16", "W3A16", "W2A16")


def _compare(what: str, one: DemoRow, other: DemoRow) -> str:
    """`other` is `one` with a change: what it does to KL, and what it costs."""
    if min(one.kl, other.kl) <= 0 or not math.isfinite(one.kl + other.kl):
        return f"{what}: KL {one.kl:.2g} -> {other.kl:.2g}"
    ratio = one.kl / other.kl
    if 1 / 1.02 < ratio < 1.02:
        effect = "the same KL within 2%"
    elif ratio > 1:
        effect = f"KL {_factor(ratio)}x smaller"
    else:
        effect = f"KL {_factor(1 / ratio)}x larger"
    bits = other.bits_per_weight - one.bits_per_weight
    return f"{what}: {effect}, {bits:+.2f} bits/w" if abs(bits) >= 0.01 else f"{what}: {effect}"


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.095 else f"{ratio:.2f}"


def row_to_json(row: DemoRow) -> dict[str, Any]:
    """The fields by name, the evaluation's among them."""
    fields = asdict(row)
    return {**{key: value for key, value in fields.items() if key != "evaluation"}, **row.evaluation.to_json()}
