"""The knapsack of mixed precision equals brute force, and keeps its laws."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import PlanError
from bitgrain.search import budget
from bitgrain.search.budget import Candidate, Group, allocate, least_bits
from random_specs import LAWS


@st.composite
def problems(draw, groups: int = 5, choices: int = 4) -> list[Group[int]]:
    """Small problems with ties, useless candidates and steps of any shape."""
    candidate = st.tuples(st.integers(0, 12), st.one_of(st.integers(0, 9).map(float), st.floats(0, 10)))
    lists = st.lists(st.lists(candidate, min_size=1, max_size=choices), min_size=1, max_size=groups)
    return [
        Group((f"layer{g}",), tuple(Candidate(i, bits, cost) for i, (bits, cost) in enumerate(found)))
        for g, found in enumerate(draw(lists))
    ]


def brute_force(groups: list[Group[int]], limit: int) -> tuple[float, int]:
    """Least cost within `limit`, and the fewest bits for it."""
    best = (math.inf, 0)
    for chosen in itertools.product(*(group.candidates for group in groups)):
        bits = sum(candidate.bits for candidate in chosen)
        if bits <= limit:
            best = min(best, (math.fsum(candidate.cost for candidate in chosen), bits))
    return best


def like_a_model(groups: int) -> list[Group[str]]:
    """Layers of a few sizes whose cost falls by about 4 for each bit, differently sensitive."""
    found: list[Group[str]] = []
    for g in range(groups):
        size, weight = (65536, 196608, 131072)[g % 3], 0.3 + math.sin(g * 12.9898) ** 2
        options = [(bits, group) for bits in range(2, 9) for group in (32, 64, 128)]
        found.append(
            Group(
                (f"layer{g}",),
                tuple(
                    Candidate(f"{b}/{n}", size * b + size // n * (16 + b), weight * 4.0**-b * (1 - 3 / n))
                    for b, n in options
                ),
            )
        )
    return found


@settings(LAWS, max_examples=100)
@given(problems(), st.integers(0, 60))
def test_equals_brute_force(groups: list[Group[int]], spare: int):
    limit = least_bits(groups) + spare
    found = allocate(groups, limit)
    cost, bits = brute_force(groups, limit)
    assert found.cost == pytest.approx(cost, abs=1e-9)
    assert found.bits <= limit
    assert found.bits == sum(candidate.bits for candidate in found.chosen)
    assert found.bound <= cost + 1e-9
    if all(candidate.cost.is_integer() for group in groups for candidate in group.candidates):
        assert found.bits == bits
    assert all(candidate in group.candidates for group, candidate in zip(groups, found.chosen, strict=True))


@settings(LAWS, max_examples=40)
@given(problems(), st.integers(0, 60))
def test_a_search_cut_short_is_feasible_and_says_how_far_it_may_be_off(groups: list[Group[int]], spare: int):
    limit = least_bits(groups) + spare
    before, budget._STATES = budget._STATES, 1
    try:
        found = allocate(groups, limit)
    finally:
        budget._STATES = before
    best, _ = brute_force(groups, limit)
    assert found.bits <= limit
    assert found.bound <= best + 1e-9 <= found.cost + 2e-9


def test_more_budget_never_costs_more():
    groups = like_a_model(24)
    least = least_bits(groups)
    steps = [allocate(groups, least + extra) for extra in range(0, 12_000_000, 400_000)]
    costs = [step.cost for step in steps]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 20
    everything = allocate(groups, 10**12)
    assert [c.choice for c in everything.chosen] == ["8/32"] * 24


def test_a_large_model_is_near_the_bound_and_fills_the_budget():
    groups = like_a_model(400)
    limit = int(least_bits(groups) * 1.7)
    found = allocate(groups, limit)
    assert found.cost <= found.bound * (1 + 1e-6)
    assert limit * (1 - 1e-4) < found.bits <= limit
    assert found == allocate(groups, limit)


def test_fused_layers_are_one_choice():
    group = Group(("q", "k", "v"), (Candidate("4", 30, 1.0), Candidate("8", 60, 0.1)))
    assert [allocate([group], bits).chosen[0].choice for bits in (30, 59, 60)] == ["4", "4", "8"]


def test_nothing_to_choose():
    found = allocate([], 0)
    assert (found.chosen, found.bits, found.cost) == ((), 0, 0.0)


def test_errors_name_the_remedy():
    group = Group(("model.q", "model.k"), (Candidate("4", 30, 1.0),))
    with pytest.raises(PlanError, match="budget of 59 bits is below the least possible, 60 bits"):
        allocate([group, group], 59)
    with pytest.raises(PlanError, match=r"model\.q \+ model\.k: no candidate"):
        allocate([Group(("model.q", "model.k"), ())], 10)
    with pytest.raises(PlanError, match=r"model\.q: the predicted cost of 4 is nan"):
        allocate([Group(("model.q",), (Candidate("4", 30, math.nan),))], 100)
