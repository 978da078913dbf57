"""What two fingerprints differ in, as people read it."""

from pathlib import Path

import pytest

from bitgrain.checkpoints.journal import Journal, Unit, changes
from bitgrain.errors import ResumeError


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a / b[1]: 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1, 2]"]),
        ({"a": {"b": 1}}, {"a": None}, ['a: {"b": 1} -> null']),
        ({}, {"é": "x" * 100}, ["é: (absent) -> " + ('"' + "x" * 100)[:77] + "..."]),
    ],
)
def test_changes_are_named_key_by_key(old, new, expected):
    assert changes(old, new) == expected


def test_many_changes_are_cut_short(tmp_path: Path):
    Journal(tmp_path / "j", {str(i): i for i in range(50)}).close()
    with pytest.raises(ResumeError, match="and 30 more"):
        Journal(tmp_path / "j", {str(i): -i - 1 for i in range(50)})


def test_the_last_line_of_a_unit_counts(tmp_path: Path):
    journal = Journal(tmp_path / "j", {})
    for unit in (Unit("a", {"t": "1"}, {"n": 1}), Unit("b", {}, {}), Unit("a", {"t": "2"}, {"n": 2})):
        journal.add(unit)
    journal.close()
    again = Journal(tmp_path / "j", {})
    again.close()
    assert list(again.units.values()) == [Unit("b", {}, {}), Unit("a", {"t": "2"}, {"n": 2})]


def test_fingerprint_must_be_plain_json(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        Journal(tmp_path / "j", {"a": float("nan")})
