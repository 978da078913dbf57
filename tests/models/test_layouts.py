"""Candidates for the rows of v and up: the right one is among them, early, and none is there twice."""

import pytest

from bitgrain.models.layouts import Layout, candidate_layouts


@pytest.mark.parametrize(
    ("rows", "columns", "counts", "wanted"),
    [
        (64, 128, [], Layout(64)),  # a separate v with two query heads for each of its own
        (384, 128, [4], Layout(128, 256)),  # q, k, v
        (256, 128, [4, 2], Layout(64, 192)),  # the same with half as many keys and values
        (512, 256, [], Layout(256, 256)),  # gate, up
        (384, 128, [4], Layout(128, 64, 32, 96)),  # q, k, v of each head
        (512, 256, [], Layout(256, 1, 1, 2)),  # gate and up in turn
        (192, 128, [4], Layout(128, 16, 32, 48)),  # the part without position of k, and v, of each head (MLA)
    ],
)
def test_known_layouts_are_tried(rows: int, columns: int, counts: list[int], wanted: Layout):
    tried = list(candidate_layouts(rows, columns, counts))
    assert wanted in tried
    assert len(set(tried)) == len(tried)
    assert len(tried) < 40
    for layout in tried:
        span = layout.span or layout.width
        last = layout.start + (layout.width // span - 1) * layout.stride + span
        assert last <= rows
        assert columns % layout.width == 0


def test_the_whole_matrix_is_the_only_try_where_it_fits():
    assert list(candidate_layouts(128, 128, [2, 4])) == [Layout(128)]
