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

BORROWED = "few calibration tokens reached it: solved with what all tokens of its layer would show it, too"
FEW = "few calibration tokens reached it: rounded to nearest"
ALONE = "few calibration tokens reached it, and its module cannot be shown others: solved with those"

Members = dict[str, list[dict[Key, int]]]
"""By the path of the module that holds the experts: of each expert the keys of its matrices, and their inputs."""


def experts_of(weights: Iterable[Weight], prefix: str = "") -> Members:
    """The experts among `weights`, by their names in memory without `prefix`."""
    found: dict[str, dict[int, dict[Key, int]]] = {}
    for weight in weights:
        if weight.role != "expert":
            continue
        name = (weight.targets[0] if weight.targets else weight.memory).removeprefix(prefix)
        place = list_place(name) if weight.experts == 1 and weight.expert is None else None
        if place is not None:
            found.setdefault(place[0], {}).setdefault(place[1], {})[Key(name)] = weight.in_features
            continue
        layer = found.setdefault(name.rpartition(".")[0], {})
        for number in range(weight.experts) if weight.experts > 1 else [weight.expert or 0]:
            layer.setdefault(number, {})[Key(name, number)] = weight.in_features
    return {path: [layer.get(i, {}) for i in range(max(layer) + 1)] for path, layer in found.items()}


def list_place(name: str) -> tuple[str, int] | None:
    """("mlp.experts", 3) for "mlp.experts.3.w1.weight": where a parameter of a list of modules is."""
    match = re.fullmatch(r"(.*expert[^.]*)\.(\d+)\..+", name)
    return None if match is None else (match[1], int(match[2]))


def told_of_model(experts: Experts, members: Members, tokens: Mapping[Key, int]) -> dict[str, dict[str, Any]]:
    """For the manifest, by the path of the module that holds the experts: the policy, how many tokens reached each of
    them (None: it is kept as it is, and was not looked at), the most that one of their matrices needs, and which are
    short of that. `tokens`: that each matrix saw."""
    found: dict[str, dict[str, Any]] = {}
    for path, layer in members.items():
        counts = [max((tokens.get(key, 0) for key in keys), default=None) for keys in layer]
        needed = max(experts.threshold(inputs) for keys in layer for inputs in keys.values())
        found[path] = told_of(experts, counts, needed)
    return found


def told_of(experts: Experts, tokens: Sequence[int | None], threshold: int) -> dict[str, Any]:
    """The same of experts whose matrices need `threshold` tokens each."""
    short = [i for i, count in enumerate(tokens) if count is not None and count < threshold]
    return {"policy": experts.policy, "threshold": threshold, "tokens": list(tokens), "short": short}


def saved_tokens(members: Members, tokens: Mapping[str, int]) -> dict[Key, int]:
    """How many tokens each expert matrix saw; `tokens`: of saved statistics, by `layer_key`."""
    keys = (key for layer in members.values() for one in layer for key in one)
    return {key: tokens.get(layer_key(key.name, key.expert), 0) for key in keys}


def needs_whole(experts: Experts, tokens: int, in_features: int) -> bool:
    """Whether an expert's matrix is solved with what all tokens of its layer would show it."""
    return experts.policy == "all" or (experts.policy == "borrow" and tokens < experts.threshold(in_features))


def settle(experts: Experts, own: Moments | None, whole: Moments | None, in_features: int) -> Moments | None:
    """The moments that an expert's matrix is solved with; None: it is rounded to nearest.

    own    of the n tokens that reached it; whole: of all tokens of its layer, where `needs_whole` and they are known
    Borrowed moments are mixed with its own, which count n / threshold: they fade out there.
    """
    tokens, threshold = 0 if own is None else own.tokens, experts.threshold(in_features)
    if experts.policy == "nearest":
        return own if tokens >= threshold else None
    if experts.policy == "all":
        return whole
    if own is None or whole is None or tokens >= threshold:
        return whole if own is None else own
    share = tokens / threshold
    return Moments(own.hessian * share + whole.hessian * (1 - share), tokens)


def note_for(experts: Experts, tokens: int, whole: bool, in_features: int) -> str | None:
    """What is told of an expert's matrix that `tokens` tokens reached; `whole`: all tokens of its layer are known.
    Of one that has no moments at all, whoever rounds it tells."""
    if experts.policy == "all" or tokens >= experts.threshold(in_features):
        return None
    if experts.policy == "borrow" and whole:
        return BORROWED
    return (FEW if experts.policy == "nearest" else ALONE) if tokens else None


def require_whole(experts: Experts, whole: Mapping[Key, Moments], name: str) -> None:
    """Raises ModelError if all tokens were to be shown to the experts `name`, and could not be."""
    if experts.policy == "all" and not whole:
        raise ModelError(
            f"{name}: its module is not told by indices which expert a token goes to, so calibration cannot be routed "
            "to all of them; use --experts borrow or nearest"
        )
