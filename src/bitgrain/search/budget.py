"""The multiple-choice knapsack of mixed precision: one candidate for each group, least cost within a budget of bits.

Costs are predicted losses that add up over the groups, so the best mix is a multiple-choice knapsack problem (Kellerer,
Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Its linear relaxation walks down the lower convex hulls of all
groups, steepest step first; what it leaves of the budget gives the greedy answer and a bound below which no answer
lies. The exact answer is found by going through the groups and keeping the partial choices that neither a cheaper and
smaller one nor the bound rules out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from bitgrain.errors import PlanError

T = TypeVar("T")

_STATES = 20_000  # partial choices that are kept for each group; with that many the rest is bounded, not exhausted


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """One way to store the layers of a group.

    choice  whatever it stands for (a QuantSpec, a Scheme; None for "kept as it is")
    bits    what it takes in storage, all members together
    cost    the loss that it is predicted to cause, all members together
    """

    choice: T
    bits: int
    cost: float


@dataclass(frozen=True)
class Group(Generic[T]):
    """Layers that must get the same choice (an engine fuses them), or a single one, and what there is to choose."""

    members: tuple[str, ...]
    candidates: tuple[Candidate[T], ...]


@dataclass(frozen=True)
class Allocation(Generic[T]):
    """What was chosen.

    chosen  for each group, in the order given
    bits    stored bits of all, at most the budget
    cost    predicted loss of all
    bound   no allocation within the budget has a lower predicted loss (`cost` itself where the search was exhaustive)
    """

    chosen: tuple[Candidate[T], ...]
    bits: int
    cost: float
    bound: float


def allocate(groups: Sequence[Group[T]], budget: int) -> Allocation[T]:
    """The candidates with the least sum of costs whose bits add up to at most `budget`.

    Exact, unless more than 20000 partial choices compete, which takes thousands of groups of almost equal ones; then
    `bound` says how far from the best the answer can be at most. Of equal answers the one of fewer bits is taken,
    and ties are broken the same way every time. Raises PlanError for a group without candidates, a cost that is not a
    number, and a budget below the least possible, which it names.
    """
    _check(groups, budget)
    problem = _Problem.of(groups)
    greedy, bound = problem.relax(budget)
    picked, exhausted = problem.search(budget, greedy)
    chosen = tuple(group.candidates[i] for group, i in zip(groups, picked, strict=True))
    cost = math.fsum(candidate.cost for candidate in chosen)
    bits = sum(candidate.bits for candidate in chosen)
    return Allocation(chosen, bits, cost, cost if exhausted else min(bound, cost))


def least_bits(groups: Sequence[Group[T]]) -> int:
    """The smallest budget for which there is an allocation. Raises PlanError for a group without candidates."""
    for group in groups:
        if not group.candidates:
            raise PlanError(f"{_name(group)}: no candidate fits this layer; keep it in full precision or allow more")
    return sum(min(candidate.bits for candidate in group.candidates) for group in groups)


def _check(groups: Sequence[Group[T]], budget: int) -> None:
    least = least_bits(groups)
    for group in groups:
        for candidate in group.candidates:
            if not math.isfinite(candidate.cost):
                raise PlanError(f"{_name(group)}: the predicted cost of {candidate.choice} is {candidate.cost}")
    if budget < least:
        raise PlanError(
            f"the budget of {budget} bits is below the least possible, {least} bits; "
            "raise --bits or allow candidates with fewer bits"
        )


def _name(group: Group[T]) -> str:
    return " + ".join(group.members) or "a group without members"


@dataclass(frozen=True)
class _Problem:
    """Groups as arrays, without the candidates that another one of the same group makes useless.

    index  [g]: numbers of the candidates that are left, by rising bits and falling cost
    bits   [g]: int64
    cost   [g]: float64
    """

    index: list[list[int]]
    bits: list[np.ndarray]
    cost: list[np.ndarray]

    @staticmethod
    def of(groups: Sequence[Group[T]]) -> _Problem:
        index = [_undominated(group.candidates) for group in groups]
        bits = [np.array([g.candidates[i].bits for i in kept], dtype=np.int64) for g, kept in zip(groups, index)]
        cost = [np.array([g.candidates[i].cost for i in kept]) for g, kept in zip(groups, index)]
        return _Problem(index, bits, cost)

    def relax(self, budget: int) -> tuple[list[int], float]:
        """The greedy choice on the hulls (positions), improved step by step, and the bound of the relaxation."""
        at = [0] * len(self.bits)
        left = budget - sum(int(bits[0]) for bits in self.bits)
        bound = math.fsum(float(cost[0]) for cost in self.cost)
        open_ = True
        for _, gain, size, g, position in _steps(self.bits, self.cost, range(len(self.bits))):
            if open_ and size <= left:
                bound -= gain
            elif open_:  # the relaxation takes a part of the first step that does not fit
                bound, open_ = bound - gain * left / size, False
            jump = int(self.bits[g][position] - self.bits[g][at[g]])
            if position > at[g] and jump <= left:
                left, at[g] = left - jump, position
        return self._fill(at, left), bound

    def _fill(self, at: list[int], left: int) -> list[int]:
        """Spend what is left on the single changes that gain most."""
        while True:
            best = (0.0, 0, 0, 0)
            for g, (bits, cost) in enumerate(zip(self.bits, self.cost, strict=True)):
                fits = np.nonzero(bits - bits[at[g]] <= left)[0]
                position = int(fits[-1])  # undominated: the largest that fits costs least
                best = max(best, (float(cost[at[g]] - cost[position]), -g, g, position))
            gain, _, g, position = best
            if gain <= 0:
                return at
            left -= int(self.bits[g][position] - self.bits[g][at[g]])
            at[g] = position

    def search(self, budget: int, greedy: list[int]) -> tuple[list[int], bool]:
        """The best choice (candidate numbers), and whether the search was exhaustive; `greedy` is where it starts."""
        order = sorted(range(len(self.bits)), key=lambda g: (-int(np.ptp(self.bits[g])), g))
        rest = _Bounds.of(self.bits, self.cost, order)
        incumbent = math.fsum(float(self.cost[g][i]) for g, i in enumerate(greedy))
        slack = 1e-12 * (abs(incumbent) + math.fsum(float(np.abs(cost).max()) for cost in self.cost))
        bits, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
        history: list[tuple[np.ndarray, np.ndarray]] = []
        exhausted = True
        for depth, g in enumerate(order):
            grown_bits = (bits[:, None] + self.bits[g][None]).reshape(-1)
            grown_cost = (cost[:, None] + self.cost[g][None]).reshape(-1)
            lowest = grown_cost + rest.at(depth + 1, budget - grown_bits)
            keep = np.nonzero(lowest <= incumbent + slack)[0]
            keep = keep[np.lexsort((keep, grown_cost[keep], grown_bits[keep]))]
            falling = np.minimum.accumulate(grown_cost[keep])
            keep = keep[np.concatenate([[True], grown_cost[keep][1:] < falling[:-1]])] if keep.size else keep
            if keep.size > _STATES:
                exhausted = False
                keep = np.sort(keep[np.argsort(lowest[keep], kind="stable")[:_STATES]])
                keep = keep[np.lexsort((grown_cost[keep], grown_bits[keep]))]
            history.append((keep // self.bits[g].size, keep % self.bits[g].size))
            bits, cost = grown_bits[keep], grown_cost[keep]
        positions = list(greedy)
        if cost.size:
            state = int(np.argmin(cost))
            for g, (parents, taken) in zip(reversed(order), reversed(history), strict=True):
                positions[g], state = int(taken[state]), int(parents[state])
        if math.fsum(float(self.cost[g][i]) for g, i in enumerate(positions)) > incumbent:
            positions = list(greedy)
        return [self.index[g][i] for g, i in enumerate(positions)], exhausted


def _undominated(candidates: Sequence[Candidate[T]]) -> list[int]:
    """Candidates by rising bits, each cheaper than all before it."""
    kept: list[int] = []
    for i in sorted(range(len(candidates)), key=lambda i: (candidates[i].bits, candidates[i].cost, i)):
        if not kept or candidates[i].cost < candidates[kept[-1]].cost:
            kept.append(i)
    return kept


def _steps(
    bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], groups: Sequence[int]
) -> list[tuple[float, float, int, int, int]]:
    """(-gain per bit, gain, bits, group, position reached) of all steps on the hulls, steepest first."""
    found: list[tuple[float, float, int, int, int]] = []
    for g in groups:
        hull = _hull(bits[g], cost[g])
        for a, b in itertools.pairwise(hull):
            gain, size = float(cost[g][a] - cost[g][b]), int(bits[g][b] - bits[g][a])
            found.append((-gain / size, gain, size, g, b))
    return sorted(found)


def _hull(bits: np.ndarray, cost: np.ndarray) -> list[int]:
    """Positions on the lower convex hull of undominated candidates."""
    hull: list[int] = []
    for i in range(bits.size):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (cost[a] - cost[b]) * float(bits[i] - bits[b]) > (cost[b] - cost[i]) * float(bits[b] - bits[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


@dataclass(frozen=True)
class _Bounds:
    """The relaxation of the groups that are still to come, for every depth of the search.

    size, gain  [steps]: of all steps on the hulls, steepest first; `depth` [steps]: at which their group is decided
    base_bits, base_cost  [groups + 1]: of the smallest candidates of the groups from a depth on
    """

    size: np.ndarray
    gain: np.ndarray
    depth: np.ndarray
    base_bits: np.ndarray
    base_cost: np.ndarray

    @staticmethod
    def of(bits: Sequence[np.ndarray], cost: Sequence[np.ndarray], order: Sequence[int]) -> _Bounds:
        depth_of = {g: depth for depth, g in enumerate(order)}
        steps = _steps(bits, cost, order)
        least = np.array([int(bits[g][0]) for g in order] + [0], dtype=np.int64)
        dear = np.array([float(cost[g][0]) for g in order] + [0.0])
        return _Bounds(
            np.array([step[2] for step in steps], dtype=np.float64),
            np.array([step[1] for step in steps], dtype=np.float64),
            np.array([depth_of[step[3]] for step in steps], dtype=np.int64),
            np.cumsum(least[::-1])[::-1],
            np.cumsum(dear[::-1])[::-1],
        )

    def at(self, depth: int, left: np.ndarray) -> np.ndarray:
        """The least cost that the groups from `depth` on can add with `left` bits; infinite where they do not fit."""
        open_ = self.depth >= depth
        size = np.concatenate([[0.0], np.cumsum(self.size[open_])])
        gain = np.concatenate([[0.0], np.cumsum(self.gain[open_])])
        spare = left - self.base_bits[depth]
        return np.where(spare >= 0, self.base_cost[depth] - np.interp(spare, size, gain), np.inf)
