"""The checks of `verify` for people: a line for each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitgrain.pipeline.checks import Check
from bitgrain.report.tables import show

__all__ = ["render_checks"]

_WORDS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("not checked", "yellow")}


def render_checks(checks: Sequence[Check], console: Console) -> None:
    """Print what was looked at, and how it was."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        word, style = _WORDS[check.ok]
        table.add_row(Text(word, style), Text(check.name), Text(check.detail))
    show(console, table)
