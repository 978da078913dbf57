"""An evaluation for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console

from bitgrain.evaluation.language import Evaluation
from bitgrain.report.tables import count_text, facts, new_table, percent_text, say, show, table_row

__all__ = ["render_evaluation", "render_variants", "rise_text"]


def render_evaluation(found: Evaluation, console: Console, *, model: str, against: str | None, text: str) -> None:
    """Print `found`; the names as the user wrote them."""
    say(console, model + (f" against {against}" if against else ""), "bold")
    say(console, f"{found.windows} windows of {found.seqlen} tokens of {text}", "dim")
    say(console)
    pairs = [("perplexity", _number(found.perplexity))]
    if found.base_perplexity is not None and found.kl is not None and found.kl_p99 is not None:
        pairs += [
            ("  of the original", _number(found.base_perplexity)),
            ("  rise", rise_text(found.perplexity, found.base_perplexity)),
            ("KL divergence", f"{_number(found.kl)} nats per token"),
            ("  99th percentile", f"{_number(found.kl_p99)} nats"),
        ]
    if found.top1 is not None:
        pairs.append(("same top-1 token", percent_text(found.top1)))
    pairs.append(("speed", f"{count_text(found.tokens_per_s)} tokens/s, forward pass"))
    facts(console, pairs)


def render_variants(found: Mapping[str, Evaluation], console: Console, *, model: str, text: str) -> None:
    """Print what each way to run `model` costs, a line each."""
    first = next(iter(found.values()))
    say(console, model, "bold")
    say(console, f"{first.windows} windows of {first.seqlen} tokens of {text}", "dim")
    say(console)
    columns = ("perplexity", "rise", "KL divergence", "99th percentile", "same top-1")
    table = new_table(console, "run with", *columns, right=columns)
    for name, one in found.items():
        assert one.base_perplexity is not None
        assert one.kl is not None
        assert one.kl_p99 is not None
        assert one.top1 is not None
        rise = rise_text(one.perplexity, one.base_perplexity)
        figures = (_number(one.perplexity), rise, _number(one.kl), _number(one.kl_p99), percent_text(one.top1))
        table_row(table, name, *figures)
    show(console, table)


def rise_text(perplexity: float, base: float) -> str:
    """`+2.10%`; `beyond float64` where a perplexity is infinite."""
    if not (math.isfinite(perplexity) and math.isfinite(base)):
        return "beyond float64"
    rise = round(100 * (perplexity / base - 1), 2)
    return f"{rise:+.2f}%" if rise else "0.00%"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "beyond float64"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
