"""What tables look like, and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = [
    "count_text",
    "duration_text",
    "facts",
    "markdown_table",
    "new_table",
    "percent_text",
    "say",
    "show",
    "table_row",
]

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def say(console: Console, text: str = "", style: str = "", *, indent: str = "") -> None:
    """One paragraph as it is: a name may hold [brackets]. Lines after the first begin with `indent`."""
    lines = Text(text, style).wrap(console, max(console.width - len(indent), 20))
    show(console, Text("\n" + indent).join(lines))


def command(console: Console, text: str) -> None:
    """A line to copy: never broken, however narrow the terminal."""
    console.print(Text(f"  {text}"), soft_wrap=True)


def show(console: Console, what: RenderableType) -> None:
    """Print `what`; without the blanks that fill lines up where there is no terminal."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    console.file.write("\n".join(line.rstrip() for line in captured.get().split("\n")))


def new_table(console: Console, *columns: str, right: Iterable[str] = (), title: str = "") -> Table:
    """A table with a line under its heads on a terminal, and with nothing but blanks elsewhere."""
    lines = console.is_terminal
    table = Table(
        title=Text(title, "bold") if title else None,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD if lines else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if lines else 2, 0, 0),
        header_style="bold",
    )
    numbers = set(right)
    for column in columns:
        # the first column holds names, which may be long; everything else stays on its line if it can
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def table_row(table: Table, *cells: str, style: str = "") -> None:
    """Cells as plain text."""
    table.add_row(*(Text(cell, style) for cell in cells))


def facts(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """`name   value` lines; an empty name goes on with the one above."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name, "dim"), Text(value))
    show(console, table)


def count_text(number: float) -> str:
    """`6.74 B` for 6 738 415 616: three digits."""
    return next((f"{number / size:.3g} {unit}" for size, unit in _COUNTS if number >= size), f"{number:.0f}")


def duration_text(seconds: float) -> str:
    """`0.31 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def percent_text(share: float) -> str:
    """`37.5%` of 0.375."""
    return f"{100 * share:.1f}%"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> str:
    """A Markdown table without a line end behind it."""
    numbers = set(right)
    lines = [columns, ["---:" if column in numbers else "---" for column in columns], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
