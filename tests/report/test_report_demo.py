"""The sentences follow from the numbers: other numbers, other sentences."""

import io
import math

import pytest
from rich.console import Console

from bitgrain.evaluation.language import Evaluation
from bitgrain.report.demo import DemoRow, frontier, kl_text, readings, render_demo, row_to_json


def row(scheme: str, bits: float, kl: float, perplexity: float = 11.0) -> DemoRow:
    found = Evaluation(perplexity, 10.0, kl, 2 * kl, 0.9, 1000.0, 512, 1, 512)
    return DemoRow(scheme, "int4", "int4 g128", bits, 1_000_000, 0.2, found)


def test_better_and_worse():
    (line,) = readings([row("W4A16", 4.125, 0.004), row("INT4_G32", 4.5, 0.002)], 10.0)
    assert line == "int4, groups of 32 instead of 128: KL 2.0x smaller, +0.38 bits/w"
    (line,) = readings([row("W4A16", 4.125, 0.002), row("INT4_G32", 4.5, 0.03)], 10.0)
    assert line.endswith("KL 15x larger, +0.38 bits/w")
    (line,) = readings([row("W4A16", 4.5, 0.002), row("INT4_G32", 4.5, 0.00201)], 10.0)
    assert line.endswith("the same KL within 2%")


@pytest.mark.parametrize("kl", [0.0, math.inf])
def test_no_ratio_of_what_has_none(kl: float):
    (line,) = readings([row("W4A16", 4.125, kl), row("INT4_G32", 4.5, 0.002)], 10.0)
    assert f"KL {kl:.2g} -> 0.002" in line


def test_a_lucky_perplexity_is_named():
    assert readings([row("X", 4.0, 0.01)], 10.0) == []
    assert readings([row("X", 4.0, 0.01, perplexity=9.9999)], 10.0) == []
    (line,) = readings([row("X", 4.0, 0.01, perplexity=9.9)], 10.0)
    assert line.startswith("X has a lower perplexity than the original")


def test_frontier():
    rows = [row("a", 8, 0.001), row("b", 4, 0.01), row("c", 4.5, 0.02), row("d", 2, 1.0), row("e", 8, 0.002)]
    assert [one.scheme for one in frontier(rows)] == ["a", "b", "d"]
    assert len(frontier([row("a", 4, 0.1), row("b", 4, 0.1)])) == 2


@pytest.mark.parametrize(("kl", "text"), [(2.3e-5, "0.023"), (0.00396, "4.0"), (0.0283, "28.3"), (0.358, "358")])
def test_kl_in_thousandths(kl: float, text: str):
    assert kl_text(kl) == text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits(width: int):
    stream = io.StringIO()
    render_demo(
        [row("W4A16_CHANNEL", 4.125, 0.004), row("W2A16", 2.1, 0.5)], 10**7, 10.0, Console(file=stream, width=width)
    )
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("W4A16_CHANNEL  int4 g128" in line for line in lines)
    assert ("size" in lines[0]) == (width >= 97)


def test_json():
    found = row_to_json(row("W4A16", 4.125, 0.004))
    assert (found["scheme"], found["bits_per_weight"], found["kl"]) == ("W4A16", 4.125, 0.004)
    assert "evaluation" not in found
