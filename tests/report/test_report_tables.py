import io
import math

import pytest
from rich.console import Console

from bitgrain.pipeline.engines import Verdict
from bitgrain.pipeline.verify import Check
from bitgrain.report.checks import render_checks
from bitgrain.report.evaluation import rise_text
from bitgrain.report.plan import engine_lines
from bitgrain.report.tables import count_text, duration_text, facts, markdown_table, new_table, say, show, table_row


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain(width: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.314, "0.31 s"), (9.94, "9.9 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(6_738_415_616, "6.74 B"), (999, "999"), (1_967_872, "1.97 M"), (0, "0")])
def test_counts(number: int, text: str):
    assert count_text(number) == text


@pytest.mark.parametrize(
    ("perplexity", "text"), [(10.2, "+2.00%"), (9.9, "-1.00%"), (9.99999, "0.00%"), (math.inf, "beyond float64")]
)
def test_rise(perplexity: float, text: str):
    assert rise_text(perplexity, 10.0) == text


def test_text_is_printed_as_it_is_and_wraps_with_an_indent():
    console = plain(30)
    say(console, "[bold]not markup[/bold] :smile: and several more words", indent="    ")
    lines = printed(console).splitlines()
    assert lines[0].startswith("[bold]not markup[/bold]")
    assert all(line.startswith("    ") for line in lines[1:])
    assert ":smile:" in printed(console)


def test_no_blanks_at_the_end_of_lines_off_a_terminal():
    console = plain()
    table = new_table(console, "name", "n", "what", right=("n",))
    table_row(table, "[a]", "1", "x")
    table_row(table, "b", "12", "longer")
    show(console, table)
    facts(console, [("key", "value"), ("", "more")])
    say(console)
    assert printed(console) == "name   n  what\n[a]    1  x\nb     12  longer\nkey  value\n     more\n\n"


def test_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]], right=("b",)) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_engines_of_one_verdict_share_a_line():
    reasons = tuple(f"4-bit kernels need inputs % 128 = 0, layers.{i}.up is (64, 64)" for i in range(9))
    verdicts = [
        Verdict("vLLM", False, reasons, version="0.33.0"),
        Verdict("SGLang", False, reasons),
        Verdict("transformers", True, ("rounds otherwise",)),
        Verdict("bitgrain", True),
    ]
    assert engine_lines(verdicts) == [
        ("vLLM 0.33.0, SGLang", "no: 4-bit kernels need inputs % 128 = 0 (layers.{0-8}.up)"),
        ("transformers", "yes: rounds otherwise"),
        ("bitgrain", "yes"),
    ]


def test_checks():
    console = plain(80)
    render_checks([Check("files", True, "3 files"), Check("x", False, "broken"), Check("y", None, "why")], console)
    assert printed(console) == "ok           files  3 files\nFAILED       x      broken\nnot checked  y      why\n"
