"""Experts: which matrices are whose, how many tokens reached them, and what those that few reached are solved with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitgrain.calibration.statistics import layer_key
from bitgrain.errors import ModelError
from bitgrain.models.anatomy import Weight
from bitgrain.recipes import Experts
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments

BORROWED = "hardly any calibration token reached it: solved with what all tokens of its layer would have shown"
FEW = "hardly any calibration token reached it: rounded to nearest"
ALONE = "hardly any calibration token reached it, and its module cannot be shown others: solved with those"

Members = dict[str, list[list[Key]]]
"""By the path of the module that holds the experts: the keys of each expert's matrices."""


def experts_of(weights: Iterable[Weight], prefix: str = "") -> Members:
    """The experts among `weights`, by their names in memory without `prefix`."""
    found: dict[str, dict[int, dict[Key, None]]] = {}
    for weight in weights:
        if weight.role != "expert":
            continue
        name = (weight.targets[0] if weight.targets else weight.memory).removeprefix(prefix)
        stacked = weight.experts > 1 or weight.expert is not None
        place = None if stacked else list_place(name)
        if place is not None:
            found.setdefault(place[0], {}).setdefault(place[1], {})[Key(name)] = None
            continue
        layer = found.setdefault(name.rpartition(".")[0], {})
        for number in range(weight.experts) if weight.experts > 1 else [weight.expert or 0]:
            layer.setdefault(number, {})[Key(name, number)] = None
    return {path: [list(layer.get(i, {})) for i in range(max(layer) + 1)] for path, layer in found.items()}


def list_place(name: str) -> tuple[str, int] | None:
    """("mlp.experts", 3) for "mlp.experts.3.w1.weight": where a parameter of a list of modules is."""
    match = re.fullmatch(r"(.*expert[^.]*)\.(\d+)\..+", name)
    return None if match is None else (match[1], int(match[2]))


def count_tokens(members: Members, tokens: Mapping[Key, int]) -> dict[str, list[int]]:
    """How many tokens reached each expert, from those that its matrices saw."""
    return {
        path: [max((tokens.get(key, 0) for key in keys), default=0) for keys in layer]
        for path, layer in members.items()
    }


def count_saved(weights: Iterable[Weight], tokens: Mapping[str, int]) -> dict[str, list[int]]:
    """The same from saved statistics; `tokens` by `layer_key`."""
    members = experts_of(weights)
    keys = (key for layer in members.values() for one in layer for key in one)
    return count_tokens(members, {key: tokens.get(layer_key(key.name, key.expert), 0) for key in keys})


def is_handled(experts: Experts, tokens: int) -> bool:
    """Whether the policy decides what an expert that `tokens` tokens reached is solved with."""
    return experts.policy == "all" or tokens < experts.tokens


def needs_whole(experts: Experts, tokens: int) -> bool:
    """Whether an expert is solved with what all tokens of its layer would show it."""
    return experts.policy != "nearest" and is_handled(experts, tokens)


def settle(experts: Experts, own: Moments | None, whole: Moments | None) -> Moments | None:
    """The moments that an expert's matrix is solved with; None: it is rounded to nearest.

    own    of the n tokens that reached it; whole: of all tokens of its layer, where `needs_whole` and they are known
    Borrowed moments are mixed with its own, which count n / `experts.tokens`: they fade out at the threshold.
    """
    tokens = 0 if own is None else own.tokens
    if not is_handled(experts, tokens):
        return own
    if experts.policy == "nearest":
        return None
    if whole is None:
        return own
    if own is None or experts.policy == "all":
        return whole
    share = tokens / experts.tokens
    return Moments(own.hessian * share + whole.hessian * (1 - share), tokens)


def require_whole(experts: Experts, whole: Mapping[Key, Moments], name: str) -> None:
    """Raises ModelError if all tokens were to be shown to the experts `name`, and could not be."""
    if experts.policy == "all" and not whole:
        raise ModelError(
            f"{name}: its module is not told by indices which expert a token goes to, so calibration cannot be routed "
            "to all of them; use --experts borrow or nearest"
        )


def note_for(experts: Experts, tokens: int, whole: bool) -> str | None:
    """What is told of an expert's matrix that `tokens` tokens reached; `whole`: all tokens of its layer are known.
    Of one that has no moments at all, whoever rounds it tells."""
    if experts.policy == "all" or not is_handled(experts, tokens):
        return None
    if experts.policy == "borrow" and whole:
        return BORROWED
    return (FEW if experts.policy == "nearest" else ALONE) if tokens else None


def told_of(experts: Experts, tokens: Sequence[int]) -> dict[str, Any]:
    """For the manifest: the policy, how many tokens reached each expert, and which of them the policy decided."""
    handled = [i for i, count in enumerate(tokens) if is_handled(experts, count)]
    return {"policy": experts.policy, "threshold": experts.tokens, "tokens": list(tokens), "handled": handled}
