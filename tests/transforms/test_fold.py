"""Gains move into the readers, and end as exactly one."""

import pytest
import torch
from torch import nn

from bitgrain.transforms import FoldNorms, Pair
from bitgrain.transforms.fold import fold
from block_views import Blocks, build


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_gains_are_one_afterwards(name: str):
    view = Blocks(build(name)).view()
    norms = [pair for pair in view.pairs if pair.kind == "norm"]
    gains = {pair.gain: view.module.get_parameter(pair.gain).clone() + pair.offset for pair in norms}
    reader = norms[0].readers[0]
    weight = view.module.get_parameter(reader).clone()
    assert FoldNorms().apply(view)["folded"] == 2
    for pair in norms:
        assert bool((view.module.get_parameter(pair.gain) + pair.offset == 1).all())
    gain = gains[norms[0].gain]
    expected = weight * (gain[:, None] if reader in norms[0].transposed else gain)
    torch.testing.assert_close(view.module.get_parameter(reader).data, expected)


def test_outside():
    blocks = Blocks(build("llama"))
    head, gain = blocks.model.lm_head.weight.clone(), blocks.model.model.norm.weight.clone()
    assert FoldNorms().apply_outside(blocks.outside())["folded"] == 1
    torch.testing.assert_close(blocks.model.lm_head.weight.data, head * gain)
    tied = FoldNorms().apply_outside(Blocks(build("llama-tied")).outside())
    assert tied["folded"] == 0
    assert "tied" in tied["note"]


@pytest.mark.parametrize("bias", [False, True])
def test_a_gain_of_zero(bias: bool):
    torch.manual_seed(0)
    norm, read = nn.LayerNorm(4, bias=bias), nn.Linear(4, 3)
    module = nn.ModuleDict({"norm": norm, "read": read})
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.0, -1.0, 0.5]))
        if bias:
            norm.bias.fill_(0.7)
    x = torch.randn(5, 4)
    before = read(norm(x)).detach()
    fold(module, [Pair("norm", "norm", ("read.weight",), 4, "norm.weight", bias="norm.bias" if bias else "")])
    torch.testing.assert_close(read(norm(x)), before)
    assert norm.weight.tolist() == [1.0, 0.0 if bias else 1.0, 1.0, 1.0]
