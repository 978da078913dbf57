"""Where, among the rows of a fused matrix, those may be that another matrix reads: v in q/k/v, up in gate/up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`width` rows: `span` from `start` and again every `stride` rows; span 0: all `width` from `start`."""

    width: int
    start: int = 0
    span: int = 0
    stride: int = 0


def candidate_layouts(rows: int, columns: int, counts: Iterable[int]) -> Iterator[Layout]:
    """Layouts of a writer with `rows` rows whose reader has `columns` columns, likely ones first, none twice.

    counts  integers among which the number of heads, or of groups of heads, may be
    A layout's width divides `columns`: rows may be read several times (GQA).
    """
    if columns % rows == 0:
        yield Layout(rows)
        return
    counts = [count for count in sorted(set(counts)) if count > 1]
    seen: set[Layout] = set()
    for width in dict.fromkeys((columns, (rows - columns) // 2, rows // 2, rows // 3)):
        if not 0 < width < rows or columns % width:
            continue
        for layout in _of_width(rows, width, counts):
            if layout not in seen:
                seen.add(layout)
                yield layout


def _of_width(rows: int, width: int, counts: list[int]) -> Iterator[Layout]:
    for start in (rows - width, width, 0):  # the last part, as v and up mostly are; in the middle; the first
        if start + width <= rows:
            yield Layout(width, start)
    for groups in counts:  # each group of heads has its own q, k and v
        if width % groups == 0 and rows % groups == 0:
            span, stride = width // groups, rows // groups
            for start in (stride - span, span, 0):
                if start + span <= stride:
                    yield Layout(width, start, span, stride)
    if rows % width == 0:  # one by one in turn
        stride = rows // width
        for start in range(stride - 1, -1, -1):
            yield Layout(width, start, 1, stride)
