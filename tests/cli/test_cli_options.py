import argparse

import pytest

from bitgrain.cli.options import parse_columns, parse_count, parse_size
from bitgrain.cli.terminal import plain_numbers


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("1000", 1000),
        ("10kB", 10_000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, nbytes: int):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "0.1", "1e9", "5 G B"])
def test_no_sizes(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "", "many"])
def test_no_counts(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("1%", {"share": 0.01}),
        ("0.02", {"share": 0.02}),
        ("0.5%:weight", {"share": 0.005, "by": "weight"}),
        ("3%:random", {"share": 0.03, "by": "random"}),
    ],
)
def test_columns(text: str, choice: dict[str, object]):
    assert parse_columns(text) == choice


@pytest.mark.parametrize("text", ["", "0", "-1%", "60%", "1%:size", "weight", "nan", "1 percent"])
def test_no_columns(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a share of the columns"):
        parse_columns(text)


def test_json_has_no_inf_and_no_nan():
    value = {"a": float("inf"), "b": [float("nan"), 1.5, (2, "x")], 3: None}
    assert plain_numbers(value) == {"a": None, "b": [None, 1.5, [2, "x"]], "3": None}
