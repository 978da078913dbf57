"""Watch: every product with a watched parameter is seen, with its inputs, by the thread that watches."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import zoo
from bitgrain.runtime.watch import Done, Key, Watch, parameters_of

Seen = list[tuple[Key, Tensor]]


def noted(seen: Seen) -> Any:
    return lambda key, x: seen.append((key, x))


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without transformers' warnings about the settings of tiny models."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


class Residual(nn.Module):
    """Two layers that write into the stream, and one that is scaled on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = self.second(x) + x
        return x + 2 * self.third(x)


class Experts(nn.Module):
    """A stack [3, out, in], used as transformers does: by linear, by matmul with its transpose, and as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        one = F.linear(x, self.stack[2])
        other = x @ self.stack[1].T
        return one + other + torch.bmm(x.expand(3, *x.shape), self.stack.transpose(1, 2)).sum(0)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
def test_linear(shape: tuple[int, ...]):
    layer, x = nn.Linear(4, 5), torch.randn(shape)
    seen: Seen = []
    after: Seen = []
    with Watch(parameters_of(layer, ["weight"]), noted(seen), output=noted(after)):
        y = layer(x)
    assert [key for key, _ in seen] == [key for key, _ in after] == [Key("weight")]
    assert seen[0][1] is x
    assert after[0][1] is y
    layer(x)
    assert len(seen) == 1  # it has been left


def test_the_weight_by_keyword():
    weight, x = torch.randn(5, 4), torch.randn(3, 4)
    seen: Seen = []
    with Watch({"w": weight}, noted(seen)):
        F.linear(x, weight=weight)
        F.linear(input=x, weight=weight)
        torch.matmul(x, other=weight.T)
    assert [key for key, _ in seen] == [Key("w")] * 3
    assert all(one is x for _, one in seen)


def test_conv1d_of_gpt2():
    layer, x = Conv1D(6, 4), torch.randn(2, 3, 4)
    seen: Seen = []
    with Watch(parameters_of(layer, ["weight"]), noted(seen)):
        layer(x)
    ((key, inputs),) = seen
    assert key == Key("weight")
    assert torch.equal(inputs, x.view(-1, 4))


def test_experts_are_told_by_their_place_in_the_stack():
    torch.manual_seed(0)
    module, x = Experts(), torch.randn(2, 4)
    seen: Seen = []
    with Watch(parameters_of(module, ["stack"]), noted(seen)):
        module(x)
    assert [key for key, _ in seen] == [Key("stack", 2), Key("stack", 1), Key("stack")]
    assert seen[0][1] is x
    assert seen[2][1].shape == (3, 2, 4)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_experts_of_transformers(name: str):
    """Both orientations of a stack: what an expert is seen to get is what its output follows from."""
    model = zoo.build(name, experts_implementation="eager")
    block = model.model.layers[0]
    experts = block.mlp.experts
    x = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 3]] * 5 + [[3, 1]] * 7)
    seen: Seen = []
    after: Seen = []
    with torch.no_grad(), Watch(parameters_of(experts, ["gate_up_proj"]), noted(seen), output=noted(after)):
        experts(x, index, torch.full((12, 2), 0.5))
    rows = {key.expert: inputs for key, inputs in seen}
    assert sorted(rows, key=str) == [0, 1, 3]
    assert torch.equal(rows[0], x[:5])
    assert torch.equal(rows[1], x[5:])
    assert torch.equal(rows[3], torch.cat([x[5:], x[:5]]))  # those whose first choice it is come first
    for (key, inputs), (_, y) in zip(seen, after, strict=True):
        matrix = experts.gate_up_proj[key.expert]
        expected = inputs @ (matrix if name == "gpt-oss" else matrix.T)
        assert torch.allclose(y, expected, atol=1e-5)


def test_sums_with_the_stream():
    module, x = Residual(), torch.randn(3, 4)
    sums: list[tuple[Key, Tensor, Tensor]] = []
    with Watch(
        parameters_of(module, ["first.weight", "second.weight", "third.weight"]),
        lambda _, __: None,
        lambda *told: sums.append(told),
    ):
        module(x)
    assert [key.name for key, _, _ in sums] == ["first.weight", "second.weight"]  # the third is scaled before
    assert sums[0][1] is x
    assert sums[1][1] is sums[0][2]
    assert torch.equal(sums[0][2], x + module.first(x))


@pytest.mark.parametrize("add", [torch.add, Tensor.add_, Tensor.__iadd__, Tensor.__radd__])
def test_every_kind_of_sum(add: Any):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    sums: list[Tensor] = []
    with (
        torch.no_grad(),
        Watch(parameters_of(layer, ["weight"]), lambda _, __: None, lambda _, other, __: sums.append(other)),
    ):
        y = layer(x)
        add(y, torch.ones(4))  # a bias, not a stream
        add(y, 1.0)
        assert sums == []
        add(y.view(1, 3, 4), x.view(1, 3, 4))
    assert len(sums) == 1
    assert torch.equal(sums[0].view(3, 4), x)


def test_sums_only_where_they_are_wanted():
    module, x = Residual(), torch.randn(3, 4)
    sums: list[str] = []
    names = ["first.weight", "second.weight"]
    watch = Watch(
        parameters_of(module, names),
        lambda _, __: None,
        lambda key, *_: sums.append(key.name),
        summed={"second.weight"},
    )
    with watch:
        module(x)
    assert sums == ["second.weight"]


def test_inputs_can_be_replaced():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    with Watch(parameters_of(layer, ["weight"]), lambda _, inputs: 2 * inputs):
        assert torch.equal(layer(x), F.linear(2 * x, layer.weight.detach().clone(), layer.bias))
    conv = Conv1D(6, 4)
    with Watch(parameters_of(conv, ["weight"]), lambda _, inputs: torch.zeros_like(inputs)):
        assert torch.equal(conv(x), conv.bias.expand(3, 6))


def test_done_leaves_the_module():
    module, x = Residual(), torch.randn(3, 4)
    seen: list[str] = []
    reached = False

    def product(key: Key, _: Tensor) -> None:
        seen.append(key.name)
        if key.name == "second.weight":
            raise Done

    with suppress(Done), Watch(parameters_of(module, ["first.weight", "second.weight", "third.weight"]), product):
        module(x)
        reached = True
    assert not reached
    assert seen == ["first.weight", "second.weight"]
    assert module(x).shape == x.shape
    assert len(seen) == 2


def test_inputs_are_seen_after_an_input_quantizer():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.register_forward_pre_hook(lambda _, args: (args[0].round(),))
    seen: Seen = []
    with Watch(parameters_of(layer, ["weight"]), noted(seen)):
        layer(x)
    assert torch.equal(seen[0][1], x.round())


def test_other_weights_are_not_seen():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    seen: Seen = []
    with Watch(parameters_of(one, ["weight"]), noted(seen)):
        one(other(torch.ones(4)))
        torch.ones(4) @ torch.ones(4, 4)
    assert len(seen) == 1


def test_threads_see_only_their_own_runs():
    """Two threads run one module at once, each with its own Watch; a third without one is not seen."""
    module = Residual()
    meet = threading.Barrier(3, timeout=20)
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        x = torch.full((3, 4), float(number))

        def product(key: Key, inputs: Tensor) -> None:
            meet.wait()  # all are inside the module now
            found[number].append(inputs)

        with torch.no_grad():
            if number == 2:
                module.first(x)
                meet.wait()
                return
            with Watch(parameters_of(module, ["first.weight"]), product):
                module(x)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {number: [float(x[0, 0]) for x in inputs] for number, inputs in found.items()} == {0: [0.0], 1: [1.0]}


def test_a_name_that_is_no_parameter():
    with pytest.raises(AttributeError, match="bonus"):
        parameters_of(nn.Linear(2, 2), ["bonus"])
