"""Which siblings are fused, and what the group is called."""

import pytest

from bitgrain.models.fused import group_id, part_of, sibling_groups


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("q_proj", ("qkv", "q")),
        ("key", ("qkv", "key")),
        ("wv", ("qkv", "v")),
        ("to_q", ("qkv", "q")),
        ("k_lin", ("qkv", "k")),
        ("gate_proj", ("gate_up", "gate")),
        ("w3", ("gate_up", "3")),
        ("wi_0", ("gate_up", "0")),
        ("kv_a_proj_with_mqa", ("qkv_a", "kv")),
        ("o_proj", None),
        ("down_proj", None),
        ("w2", None),
        ("qkv_proj", None),
        ("gate_up_proj", None),
        ("q_b_proj", None),
        ("fc1", None),
    ],
)
def test_parts(leaf, expected):
    assert part_of(leaf) == expected


def test_groups_need_one_parent_and_one_number_of_inputs():
    members = [
        ("a", "h.0.attn.q_proj", 64),
        ("b", "h.0.attn.k_proj", 64),
        ("c", "h.0.attn.v_proj", 32),  # reads something else
        ("d", "h.1.attn.q_proj", 64),  # alone: shares another block's keys
        ("e", "h.1.mlp.gate", 64),  # a router: there is no "up" beside it
    ]
    assert sibling_groups(members) == [["a", "b"]]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["h.0.attn.q_proj", "h.0.attn.k_proj"], "h.0.attn.qkv"),
        (["h.0.experts.3.w1", "h.0.experts.3.w3"], "h.0.experts.3.gate_up"),
        (["h.0.left", "h.0.right"], "h.0.fused"),
    ],
)
def test_ids(modules, expected):
    assert group_id(modules) == expected
