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
    experts_of,
    list_place,
    needs_whole,
    note_for,
    require_whole,
    saved_tokens,
    settle,
    told_of,
    told_of_model,
)
from bitgrain.recipes import Experts
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments

pytestmark = pytest.mark.usefixtures("device")

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
        assert all(n == (256 if "down" in key.name else 128) for keys in layer for key, n in keys.items())
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
    members = {"m": [{Key("up", 0): 8, Key("down", 0): 16}, {Key("up", 1): 8, Key("down", 1): 16}, {}]}
    assert saved_tokens(members, {"up[0]": 31, "down[0]": 32, "q": 9}) == {
        Key("up", 0): 31,
        Key("down", 0): 32,
        Key("up", 1): 0,
        Key("down", 1): 0,
    }
    told = told_of_model(Experts(), members, {Key("up", 0): 63, Key("down", 0): 64})
    assert told == {"m": {"policy": "borrow", "threshold": 4 * 16, "tokens": [64, 0, None], "short": [1]}}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(1, 20), st.booleans())
def test_what_is_borrowed_fades_out_at_the_threshold(tokens: int, threshold: int, known: bool):
    own, whole = moments(tokens, 1.0) if tokens else None, moments(99, 3.0)
    experts = Experts(policy="borrow", tokens=threshold)
    found = settle(experts, own, whole if known else None, 77)
    assert needs_whole(experts, tokens, 77) == (tokens < threshold)
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
    own, layer = moments(tokens, 1.0) if tokens else None, None if whole is None else moments(whole, 3.0)
    for experts, in_features in ((Experts(policy=policy, tokens=8), 5), (Experts(policy=policy), 2)):
        check_settled(settle(experts, own, layer, in_features), own, layer, expected)
        assert note_for(experts, tokens, layer is not None, in_features) == note


def check_settled(found: Moments | None, own: Moments | None, layer: Moments | None, expected: str) -> None:
    kinds = {"none": None, "own": own, "whole": layer}
    assert (found is kinds[expected]) if expected in kinds else (found is not own and found is not layer)


def test_what_is_told():
    told = told_of(Experts(policy="all"), [3, 8, 0], 8)
    assert told == {"policy": "all", "threshold": 8, "tokens": [3, 8, 0], "short": [0, 2]}


def test_all_cannot_be_had_of_every_layer():
    key, known = Key("experts", 0), moments(1, 1.0)
    require_whole(Experts(policy="borrow"), {}, "mlp.experts")
    require_whole(Experts(policy="all"), {key: known}, "mlp.experts")
    with pytest.raises(ModelError, match=r"mlp\.experts: .*not told by indices.*--experts borrow or nearest"):
        require_whole(Experts(policy="all"), {}, "mlp.experts")
