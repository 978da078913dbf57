"""RPTQ's reordering: the function stays, clusters are contiguous, and what was moved can be put back bit for bit."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from bitgrain.transforms import BlockView, get_transform
from block_views import Blocks, build, extremes

SCHEME = "W8A8_RPTQ"
MOVED = {"norm", "heads", "rows"}


def copied(view: BlockView) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in view.module.state_dict().items()}


def matrix(view: BlockView, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """[out, in]"""
    owner = view.module.get_submodule(name.removesuffix(".weight"))
    return state[name].T if isinstance(owner, Conv1D) else state[name]


def same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same rows (or numbers), bit for bit, in any order."""
    rows = [one if one.ndim > 1 else one.unsqueeze(-1) for one in (a, b)]
    return sorted(map(tuple, rows[0].tolist())) == sorted(map(tuple, rows[1].tolist()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "phi", "phi3", "gpt2", "opt"])
def test_the_output_stays_and_every_input_comes_in_clusters(name: str):
    """Grouped queries, fused q/k/v and gate/up, biases, transposed weights, activations that no scaling passes."""
    view = Blocks(build(name), SCHEME).view()
    original, before = copied(view), view.run(0)
    figures = get_transform("reorder").apply(view)
    assert float((view.run(0) - before).abs().max() / before.std()) < 1e-4
    assert figures["difference"] < 1e-4
    assert set(figures["moved"]) == set(view.specs) == set(view.clusters)
    assert set(figures["moved"].values()) == MOVED
    low, high = extremes(view.module, list(view.specs), view.run)
    state = view.module.state_dict()
    columns = {}
    for reader, clusters in view.clusters.items():
        order = clusters.order
        assert sum(clusters.sizes) == len(order)
        assert len(clusters.sizes) <= 32
        torch.testing.assert_close(low[reader], view.low[reader][order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(high[reader], view.high[reader][order], atol=1e-4, rtol=1e-4)
        columns[reader] = matrix(view, state, reader)[:, order.argsort()]
    for key, value in original.items():
        if key in columns:
            assert same_rows(columns[key], matrix(view, original, key)), key
        else:
            assert same_rows(state[key], value), key
    readers = set(columns) - {"self_attn.v_proj.weight"}
    exact = [key for key in readers if torch.equal(columns[key], matrix(view, original, key))]
    assert len(exact) >= 2  # those whose rows nobody reads in clusters


def test_narrow_clusters_hold_narrow_channels():
    view = Blocks(build("llama"), SCHEME).view()
    get_transform("reorder").apply(view)
    for reader in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        clusters = view.clusters[reader]
        width = (view.high[reader] - view.low[reader])[clusters.order]
        within = torch.cat([run - run.mean() for run in width.split(clusters.sizes)])
        assert float(within.var()) < 0.1 * float(width.var())
        means = torch.stack([run.mean() for run in width.split(clusters.sizes)])
        assert torch.equal(means, means.sort().values)


def test_query_heads_of_one_head_of_values_move_alike():
    view = Blocks(build("llama"), SCHEME).view()
    get_transform("reorder").apply(view)
    heads = view.clusters["self_attn.o_proj.weight"].order.view(2, 2, 32) % 32
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])


def test_where_channels_cannot_move_neighbours_are_joined():
    """BERT's norms write the residual stream itself."""
    view = Blocks(build("bert"), SCHEME).view()
    original, before = copied(view), view.run(0)
    figures = get_transform("reorder").apply(view)
    assert torch.equal(view.run(0), before) or figures["difference"] < 1e-4
    assert figures["moved"]["attention.self.query.weight"] == "in place"
    assert figures["moved"]["output.dense.weight"] == "rows"
    assert not figures["norms"]
    clusters = view.clusters["attention.self.query.weight"]
    assert torch.equal(clusters.order, torch.arange(128))
    assert len(clusters.sizes) == 32
    assert torch.equal(view.module.state_dict()["attention.self.query.weight"], original["attention.self.query.weight"])


def test_experts_and_schemes_without_clusters_are_left_alone():
    view = Blocks(build("mixtral"), SCHEME).view()
    moved = get_transform("reorder").apply(view)["moved"]
    assert {name.split(".")[0] for name in moved} == {"self_attn"}
    plain = Blocks(build("llama"), "W8A8_STATIC").view()
    original = copied(plain)
    assert get_transform("reorder").apply(plain) == {"moved": {}, "norms": {}, "difference": 0.0}
    assert all(torch.equal(value, original[key]) for key, value in plain.module.state_dict().items())
    assert not plain.clusters


class Summed(torch.nn.Module):
    """An activation that tells channels by their places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1) / x.shape[-1]


@pytest.mark.parametrize(("activation", "how"), [(torch.nn.Softmax(-1), "rows"), (Summed(), "in place")])
def test_a_block_that_hardly_depends_on_its_mlp_is_not_fooled(activation: torch.nn.Module, how: str):
    """The output alone would prove any order."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-7)
            layer.mlp.act_fn = activation
    view = Blocks(model, SCHEME).view()
    assert get_transform("reorder").apply(view)["moved"]["mlp.down_proj.weight"] == how
