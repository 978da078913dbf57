"""Biases move into the readers' biases, and only where each reader has one."""

import pytest

from bitgrain.transforms import AbsorbBias
from block_views import Blocks, build


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("gpt2", ["ln_1.bias", "ln_2.bias"]),
        ("opt", ["self_attn_layer_norm.bias", "final_layer_norm.bias", "self_attn.v_proj.bias"]),
    ],
)
def test_absorbed(name: str, moved: list[str]):
    view = Blocks(build(name)).view()
    figures = AbsorbBias().apply(view)
    assert set(moved) <= set(figures["absorbed"])
    assert figures["skipped"] == []
    assert all(not view.module.get_parameter(bias).any() for bias in moved)


def test_only_the_rows_of_v_lose_their_bias():
    view = Blocks(build("gpt2")).view()
    q_and_k = view.module.get_parameter("attn.c_attn.bias")[:256].clone()
    AbsorbBias().apply(view)
    bias = view.module.get_parameter("attn.c_attn.bias")
    assert not bias[256:].any()
    assert bias[:256].any()
    assert not bias[:256].equal(q_and_k)  # the norm's bias has come in


def test_attention_that_does_not_sum_to_one_keeps_it():
    """gpt-oss has sinks: what attention gives does not hold all of v's bias."""
    view = Blocks(build("gpt-oss")).view()
    before = {name: value.clone() for name, value in view.module.state_dict().items()}
    figures = AbsorbBias().apply(view)
    assert figures["absorbed"] == []
    assert figures["skipped"] == ["self_attn.v_proj.bias"]
    assert all(value.equal(before[name]) for name, value in view.module.state_dict().items())


def test_readers_without_a_bias():
    view = Blocks(build("gpt2")).view()
    view.module.attn.c_attn.register_parameter("bias", None)
    view.pairs = [pair for pair in view.pairs if pair.writer == "ln_1"]
    before = view.module.ln_1.bias.clone()
    view.run = lambda _: before
    assert AbsorbBias().apply(view) == {"absorbed": [], "skipped": ["ln_1.bias"], "difference": 0.0}
    assert view.module.ln_1.bias.equal(before)
