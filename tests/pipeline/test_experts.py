"""Which matrices are whose expert's, and what becomes of those that few tokens reached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitgrain
from bitgrain.errors import ModelError
from bitgrain.pipeline.experts import (
    ALONE,
    BORROWED,
    FEW,
    count_tokens,
    experts_of,
    list_place,
    needs_whole,
    note_for,
    require_whole,
    settle,
    told_of,
)
from bitgrain.recipes import Experts
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments

Tiny = Callable[[str], Path]
Policy = Literal["borrow", "all", "nearest"]


def moments(tokens: int, value: float) -> Moments:
    return Moments(torch.eye(3) * value, tokens)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("mixtral", {"gate_up_proj", "down_proj"}), ("gpt-oss", {"gate_up_proj", "down_proj"}), ("llama", set())],
)
def test_whose_matrix_it_is(name: str, parts: set[str], tiny: Tiny):
    weights = bitgrain.plan(tiny(name), "W4A16").anatomy.weights
    members = experts_of(weights)
    assert list(members) == ([f"model.layers.{i}.mlp.experts" for i in (0, 1)] if parts else [])
    for path, layer in members.items():
        assert [set(keys) for keys in layer] == [{Key(f"{path}.{part}", i) for part in parts} for i in range(4)]
    inside = experts_of([weight for weight in weights if weight.block == 1], "model.layers.1.")
    assert list(inside) == (["mlp.experts"] if parts else [])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mlp.experts.3.w1.weight", ("mlp.experts", 3)),
        ("model.layers.7.moe.local_experts.12.down_proj.weight", ("model.layers.7.moe.local_experts", 12)),
        ("model.layers.7.mlp.experts.gate_up_proj", None),
        ("model.layers.7.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.7.mlp.up_proj.weight", None),
    ],
)
def test_where_a_parameter_of_a_list_is(name: str, place: Any):
    assert list_place(name) == place


def test_tokens_are_counted_by_any_matrix_of_an_expert():
    members = {"m": [[Key("up", 0), Key("down", 0)], [Key("up", 1), Key("down", 1)], []]}
    assert count_tokens(members, {Key("up", 0): 5, Key("down", 0): 4}) == {"m": [5, 0, 0]}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_what_is_borrowed_fades_out_at_the_threshold(tokens: int, threshold: int, known: bool):
    own, whole = moments(tokens, 1.0) if tokens else None, moments(99, 3.0)
    experts = Experts(policy="borrow", tokens=threshold)
    found = settle(experts, own, whole if known else None)
    assert needs_whole(experts, tokens) == (tokens < threshold)
    if tokens >= threshold or not known:
        assert found is own
        return
    assert found is not None
    share = tokens / threshold
    assert torch.allclose(found.hessian, torch.eye(3) * (share + 3 * (1 - share)))
    assert found.tokens == (tokens or 99)


@pytest.mark.parametrize(
    ("policy", "tokens", "whole", "expected", "note"),
    [
        ("nearest", 0, None, "none", None),
        ("nearest", 7, None, "none", FEW),
        ("nearest", 8, None, "own", None),
        ("borrow", 0, 99, "whole", BORROWED),
        ("borrow", 0, None, "none", None),
        ("borrow", 7, 99, "mixed", BORROWED),
        ("borrow", 7, None, "own", ALONE),
        ("borrow", 8, None, "own", None),
        ("all", 0, 99, "whole", None),
        ("all", 7, 99, "whole", None),
        ("all", 800, 99, "whole", None),
    ],
)
def test_the_policies(policy: Policy, tokens: int, whole: int | None, expected: str, note: str | None):
    experts = Experts(policy=policy, tokens=8)
    own, layer = moments(tokens, 1.0) if tokens else None, None if whole is None else moments(whole, 3.0)
    found = settle(experts, own, layer)
    kinds = {"none": None, "own": own, "whole": layer}
    assert (found is kinds[expected]) if expected in kinds else (found is not own and found is not layer)
    assert note_for(experts, tokens, layer is not None) == note


def test_what_is_told():
    told = told_of(Experts(tokens=8), [3, 8, 0])
    assert told == {"policy": "borrow", "threshold": 8, "tokens": [3, 8, 0], "handled": [0, 2]}
    assert told_of(Experts(policy="all"), [300, 0])["handled"] == [0, 1]


def test_all_cannot_be_had_of_every_layer():
    key, known = Key("experts", 0), moments(1, 1.0)
    require_whole(Experts(policy="borrow"), {}, "mlp.experts")
    require_whole(Experts(policy="all"), {key: known}, "mlp.experts")
    with pytest.raises(ModelError, match=r"mlp\.experts: .*not told by indices.*--experts borrow or nearest"):
        require_whole(Experts(policy="all"), {}, "mlp.experts")
