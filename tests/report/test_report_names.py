from hypothesis import given
from hypothesis import strategies as st

from bitgrain.report.names import Group, few_names, group_names, join_names, number_ranges


def names(*groups: Group) -> list[tuple[str, int]]:
    return [(group.name, group.count) for group in groups]


def test_blocks_are_one_line():
    layers = [(f"model.layers.{i}.{leaf}", "W4A16") for i in range(32) for leaf in ("mlp.up_proj", "mlp.down_proj")]
    assert names(*group_names([("lm_head", "kept"), *layers])) == [
        ("lm_head", 1),
        ("model.layers.{0-31}.mlp.up_proj", 32),
        ("model.layers.{0-31}.mlp.down_proj", 32),
    ]


def test_a_different_scheme_is_a_line_of_its_own():
    layers = [(f"h.{i}.fc", "W8A16" if i in (0, 5) else "W4A16") for i in range(6)]
    assert names(*group_names(layers)) == [("h.{0,5}.fc", 2), ("h.{1-4}.fc", 4)]


def test_braces_promise_every_combination():
    full = [(f"l.{i}.experts.{j}.up", 0) for i in range(3) for j in range(8)]
    assert names(*group_names(full)) == [("l.{0-2}.experts.{0-7}.up", 24)]
    missing = [pair for pair in full if pair[0] != "l.1.experts.4.up"]
    assert names(*group_names(missing)) == [
        ("l.{0,2}.experts.{0-7}.up", 16),
        ("l.1.experts.{0-3,5-7}.up", 7),
    ]


def test_only_whole_parts_are_numbers():
    assert names(*group_names([("block1.conv2d", 0), ("block2.conv2d", 0)])) == [
        ("block1.conv2d", 1),
        ("block2.conv2d", 1),
    ]
    assert names(*group_names([("0.weight", 0), ("1.weight", 0), ("1.0", 0)])) == [("{0-1}.weight", 2), ("1.0", 1)]


def test_names_with_braces_of_their_own():
    assert join_names(["odd{name}", "{}.3", "{}.4"]) == "odd{name}, {}.{3-4}"


def test_few_names():
    many = [f"a.{i}.{leaf}" for leaf in "pqrst" for i in range(4)]
    assert few_names(many) == "a.{0-3}.p, a.{0-3}.q and 12 more"
    assert few_names(many[:12]) == "a.{0-3}.p, a.{0-3}.q, a.{0-3}.r"
    assert few_names([]) == ""


def test_ranges():
    assert number_ranges([7, 0, 1, 2, 9, 8]) == "0-2,7-9"
    assert number_ranges([3]) == "3"


def expand(name: str) -> list[str]:
    """The names that a group stands for: the inverse, written down plainly."""
    head, opening, rest = name.partition("{")
    if not opening:
        return [name]
    inside, _, tail = rest.partition("}")
    numbers: list[int] = []
    for run in inside.split(","):
        first, _, last = run.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [f"{head}{number}{end}" for number in numbers for end in expand(tail)]


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("ab"), st.sampled_from("xy"))))
def test_groups_stand_for_exactly_their_names(members: set[tuple[int, int, str, str]]):
    given_names = [(f"m.{i}.e.{j}.{leaf}", key) for i, j, leaf, key in sorted(members)]
    groups = group_names(given_names)
    expanded = [(name, group.key) for group in groups for name in expand(group.name)]
    assert sorted(expanded) == sorted(given_names)
    assert sum(group.count for group in groups) == len(given_names)
