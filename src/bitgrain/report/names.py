"""Many names as few: `model.layers.{0-31}.mlp.down_proj` for the 32 of them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Group", "few_names", "group_names", "join_names", "number_ranges"]

K = TypeVar("K", bound=Hashable)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a dotted name that is nothing but digits."""


@dataclass(frozen=True)
class Group(Generic[K]):
    """`count` names that differ in their numbers only, written as one; `key` is what they have in common."""

    name: str
    count: int
    key: K


def group_names(names: Iterable[tuple[str, K]]) -> list[Group[K]]:
    """The (name, key) pairs, those with equal keys and equal texts between their numbers as one.

    Each group stands for exactly its names: `{0-3}` leaves none out, and with two pairs of braces every combination
    is there. Groups come in the order of their first names. A name that occurs twice is counted once.
    """
    found: dict[tuple[str, K], dict[tuple[int, ...], None]] = {}
    for name, key in names:
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        found.setdefault((_NUMBER.sub("0", name), key), {})[numbers] = None
    return [
        Group(_fill(template, box), _size(box), key)
        for (template, key), numbers in found.items()
        for box in _boxes(list(numbers))
    ]


def join_names(names: Iterable[str]) -> str:
    """The names as few, with commas between."""
    return ", ".join(group.name for group in group_names((name, None) for name in names))


def few_names(names: Iterable[str], most: int = 2) -> str:
    """As `join_names`, but of more than `most` groups only these: `a.{0-3}.b, a.{0-3}.c and 12 more`."""
    groups = group_names((name, None) for name in names)
    if len(groups) <= most + 1:
        return ", ".join(group.name for group in groups)
    left = sum(group.count for group in groups[most:])
    return ", ".join(group.name for group in groups[:most]) + f" and {left} more"


def number_ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


Box = list[tuple[int, ...]]
"""One tuple of numbers for each place; the box holds every combination."""


def _boxes(points: Sequence[tuple[int, ...]]) -> list[Box]:
    """Disjoint boxes that hold exactly `points`: equal tails are joined over their first numbers."""
    if not points[0]:
        return [[]]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for head, *tail in points:
        tails.setdefault(head, []).append(tuple(tail))
    heads: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head, same in tails.items():
        heads.setdefault(frozenset(same), []).append(head)
    return [[tuple(mine), *box] for mine in heads.values() for box in _boxes(tails[mine[0]])]


def _size(box: Box) -> int:
    size = 1
    for numbers in box:
        size *= len(numbers)
    return size


def _fill(template: str, box: Box) -> str:
    """The template with the numbers of the box in the place of its own."""
    texts = iter([str(numbers[0]) if len(numbers) == 1 else f"{{{number_ranges(numbers)}}}" for numbers in box])
    return _NUMBER.sub(lambda _: next(texts), template)
