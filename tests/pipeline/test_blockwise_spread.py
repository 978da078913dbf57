"""All tokens shown to any expert: against the module's own weights written out, and nothing else is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitgrain.models.stream import Call
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Seen, observe
from bitgrain.pipeline.blockwise.spread import Spread, whole_moments
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.runtime.watch import Key
from block_zoo import Block, open_block

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def stage_of(block: Block, name: str) -> Stage:
    (stage,) = (stage for stage in block.stages() if name in stage.names)
    return stage


def entering(block: Block, batch: int) -> Tensor:
    """What the router reads: the tokens that enter the layer of experts."""
    found: list[Tensor] = []
    router = block.module.get_submodule("mlp")
    hook = router.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    block.module(block.inputs[batch], *block.calls[batch].args, **block.calls[batch].kwargs)
    hook.remove()
    return found[0]


def inner(block: Block, x: Tensor, expert: int, name: str) -> Tensor:
    """What an expert's down projection reads if it is given x, by the formulas of the models."""
    weight = block.module.get_parameter(UP)[expert]
    if name == "mixtral":
        gate, up = (x @ weight.T).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up
    product = x @ weight + block.module.get_parameter(UP + "_bias")[expert]
    gate, up = product[..., ::2].clamp(max=7.0), product[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_every_expert_is_shown_all_tokens(name: str, tiny: Tiny):
    block = open_block(tiny(name))
    with torch.no_grad():
        x = entering(block, 1)
        before = observe(block.module, block.inputs[1], block.calls[1], block.stages(), to_end=True)
        with Spread(block.module, block.inputs, block.calls, stage_of(block, UP)) as spread:
            seen = spread.seen(1, [Key(UP, i) for i in range(4)])
        assert all(torch.equal(seen.inputs[Key(UP, i)], x) for i in range(4))
        with Spread(block.module, block.inputs, block.calls, stage_of(block, DOWN)) as spread:
            seen = spread.seen(1, [Key(DOWN, 2), Key(DOWN, 0)])
        assert list(seen.inputs) == [Key(DOWN, 2), Key(DOWN, 0)]
        for key, found in seen.inputs.items():
            assert key.expert is not None
            assert torch.allclose(found, inner(block, x, key.expert, name), atol=1e-5)
        after = observe(block.module, block.inputs[1], block.calls[1], block.stages(), to_end=True)
    assert before[1] is not None
    assert after[1] is not None
    assert torch.equal(before[1], after[1])  # what flows on stays as the router decides
    assert all(torch.equal(after[0].inputs[key], x) for key, x in before[0].inputs.items())
    assert not any(module._forward_pre_hooks for module in block.module.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_moments_are_those_of_all_tokens_for_any_number_of_workers(name: str, tiny: Tiny):
    block = open_block(tiny(name))
    with torch.no_grad():
        x = torch.cat([entering(block, batch) for batch in range(len(block.inputs))])
    for leaf in (UP, DOWN):
        stage = stage_of(block, leaf)
        keys = [Key(leaf, i) for i in (0, 1, 3)]
        found = []
        for workers in (1, 3):
            noted: list[Seen] = []
            with Pool(workers) as pool:
                arguments = (block.module, block.inputs, block.calls, stage, keys, pool, "layers.0")
                found.append(whole_moments(*arguments, lambda _, seen, noted=noted: noted.append(seen)))
            shown = {key for seen in noted for key in seen.inputs}
            assert shown == ({keys[0]} if leaf == UP else set(keys))  # what is the same is looked at once
        assert list(found[0]) == keys
        for key in keys:
            moments = found[0][key]
            assert torch.equal(moments.hessian, found[1][key].hessian)
            assert moments.tokens == len(x)
            assert key.expert is not None
            rows = (x if leaf == UP else inner(block, x, key.expert, name)).double()
            exact = rows.T @ rows / len(rows)
            assert torch.allclose(moments.hessian.double(), exact, atol=1e-5 * float(exact.diagonal().max()))
        assert (found[0][keys[0]] is found[0][keys[1]]) == (leaf == UP)


class Lists(nn.Module):
    """A layer with a list of experts, as the checkpoints' own code has them; it scales what they read, or not."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.mlp = factor, nn.Module()
        self.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3))
        self.mlp.forward = self.choose
        self.requires_grad_(False)

    def choose(self, x: Tensor) -> Tensor:
        rows, result = x.reshape(-1, 4), torch.zeros_like(x.reshape(-1, 4))
        for i, expert in enumerate(self.mlp.experts):
            mine = rows[:, 0].sign() == (1, -1, 5)[i]  # the last gets none
            if bool(mine.any()):
                result[mine] = expert(self.factor * rows[mine])
        return result.view(x.shape)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(hidden)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_experts_that_are_modules(factor: float):
    """They are shown what entered the module around them, if that is what they choose from."""
    torch.manual_seed(0)
    block, hidden = Lists(factor), [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    calls = [Call((), {})] * 2
    names = [f"mlp.experts.{i}.{j}.weight" for i in range(3) for j in (0, 2)]
    first, second = find_stages(block, names, hidden[0], calls[0])[:2]
    with Pool(2) as pool:
        for stage, place in ((first, 0), (second, 2)):
            keys = [Key(f"mlp.experts.{i}.{place}.weight") for i in (0, 2)]
            found = whole_moments(block, hidden, calls, stage, keys, pool, "layers.0")
            assert list(found) == (keys if factor == 1 else [])
            for key, moments in found.items():
                rows = torch.cat(hidden).reshape(-1, 4)
                if place:
                    rows = block.mlp.experts[int(key.name.split(".")[2])][:2](rows)  # type: ignore[index]
                assert moments.tokens == 20
                assert torch.allclose(moments.hessian, rows.T @ rows / 20, atol=1e-6)


class Dense(nn.Module):
    """A stack that computes every expert of every token: no index says where tokens go."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Stack()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp.experts(hidden.expand(3, -1, -1)).sum(0)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


def test_a_layer_that_cannot_be_asked_is_left_out():
    block, hidden, calls = Dense(), [torch.randn(1, 5, 4)], [Call((), {})]
    hidden[0][0, 3] = 0
    (stage,) = find_stages(block, ["mlp.experts.weight"], hidden[0], calls[0])
    assert not stage.shared
    seen, _ = observe(block, hidden[0], calls[0], [stage])
    assert {key: len(x) for key, x in seen.inputs.items()} == {Key("mlp.experts.weight", i): 4 for i in range(3)}
    with Pool(1) as pool:
        keys = [Key("mlp.experts.weight", i) for i in range(3)]
        assert whole_moments(block, hidden, calls, stage, keys, pool, "layers.0") == {}
        assert whole_moments(block, hidden, calls, stage, [], pool, "layers.0") == {}
