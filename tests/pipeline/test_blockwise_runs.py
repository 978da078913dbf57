"""Three ways to walk batches through a block that show the same, to the bit."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitgrain.models.stream import Call
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Kept, Reruns, Runs, Seen, Walk, observe
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.runtime.watch import Key
from block_zoo import Block, open_block

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]
DENSE = ["llama", "phi", "gpt2", "opt", "bert"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("bitgrain")]


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` gives; a deadlock is a failure and not a hanging test."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def change(block: nn.Module, stage: Stage) -> None:
    """As if the stage had been quantized."""
    with torch.no_grad():
        for name in stage.names:
            parameter = block.get_parameter(name)
            parameter.copy_(torch.round(parameter * 20) / 20)


def walk_through(
    walk: Walk, block: nn.Module, stages: list[Stage], batches: int, changes: bool
) -> tuple[list[Seen], list[Tensor]]:
    """Everything that a walk shows: batch after batch of each stage, and the outputs."""
    shown: list[Seen] = []
    with walk, torch.no_grad():
        for place, stage in enumerate(stages):
            shown += [walk.seen(batch, place) for batch in range(batches)]
            shown[-batches:] = [
                Seen(
                    {key: x.clone() for key, x in one.inputs.items()}, {k: x.clone() for k, x in one.residuals.items()}
                )
                for one in shown[-batches:]
            ]
            if changes:
                change(block, stage)
            walk.release(place)
        return shown, walk.outputs()


def same(one: tuple[list[Seen], list[Tensor]], other: tuple[list[Seen], list[Tensor]]) -> None:
    assert len(one[0]) == len(other[0])
    for a, b in zip(one[0], other[0], strict=True):
        assert list(a.inputs) == list(b.inputs)
        assert a.residuals.keys() == b.residuals.keys()
        assert all(torch.equal(a.inputs[key], b.inputs[key]) for key in a.inputs)
        assert all(torch.equal(a.residuals[key], b.residuals[key]) for key in a.residuals)
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def reruns(block: Block, stages: list[Stage], pool: Pool) -> Reruns:
    return Reruns(block.module, block.inputs, block.calls, stages, pool)


@pytest.mark.parametrize("name", DENSE)
def test_all_three_show_the_same(tiny: Tiny, name: str):
    block = open_block(tiny(name))
    stages, count = block.stages(), len(block.inputs)
    with Pool(2) as pool:
        expected = walk_through(reruns(block, stages, pool), block.module, stages, count, False)
        kept = Kept(block.module, block.inputs, block.calls, stages)
        same(walk_through(kept, block.module, stages, count, False), expected)
        for workers in (1, 2, 5):
            runs = Runs(block.module, block.inputs, block.calls, stages, workers)
            same(within(60, lambda runs=runs: walk_through(runs, block.module, stages, count, False)), expected)


@pytest.mark.parametrize("name", DENSE)
def test_stopped_runs_see_weights_that_change(tiny: Tiny, name: str):
    block, other = open_block(tiny(name)), open_block(tiny(name))
    stages, count = block.stages(), len(block.inputs)
    unchanged = walk_through(Kept(block.module, block.inputs, block.calls, stages), block.module, stages, count, False)
    with Pool(1) as pool:
        expected = walk_through(reruns(other, stages, pool), other.module, stages, count, True)
    runs = Runs(block.module, block.inputs, block.calls, stages, 2)
    found = within(60, lambda: walk_through(runs, block.module, stages, count, True))
    same(found, expected)
    last = len(stages) - 1
    assert not torch.equal(*(next(iter(shown[0][last * count].inputs.values())) for shown in (found, unchanged)))
    assert not torch.equal(found[1][0], unchanged[1][0])
    assert torch.equal(*(next(iter(shown[0][0].inputs.values())) for shown in (found, unchanged)))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_seen_with_their_own_tokens(tiny: Tiny, name: str):
    block = open_block(tiny(name))
    stages, count = block.stages(), len(block.inputs)
    with Pool(2) as pool:
        shown, outputs = walk_through(reruns(block, stages, pool), block.module, stages, count, False)
    kept = walk_through(Kept(block.module, block.inputs, block.calls, stages), block.module, stages, count, False)
    same((shown, outputs), kept)
    tokens = block.inputs[0].shape[0] * block.inputs[0].shape[1]
    for seen in shown[2 * count : 3 * count]:
        assert {key.name for key in seen.inputs} == {"mlp.experts.gate_up_proj"}
        assert all(key.expert in range(4) for key in seen.inputs)
        assert sum(len(x) for x in seen.inputs.values()) == 2 * tokens  # each token goes to two experts


def test_what_is_seen_is_what_modules_are_given(tiny: Tiny):
    """The oracle: forward hooks, and the sums written out."""
    block = open_block(tiny("llama"))
    stages = block.stages()
    given: dict[str, Tensor] = {}
    hooks = [
        block.module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: given.update({name: args[0].reshape(-1, args[0].shape[-1])})
        )
        for name in block.names
    ]
    with torch.no_grad():
        attention = given  # filled by the run below
        output = block.module(block.inputs[1], *block.calls[1].args, **block.calls[1].kwargs)
    for hook in hooks:
        hook.remove()
    seen, found = observe(block.module, block.inputs[1], block.calls[1], stages, to_end=True)
    assert found is not None
    assert torch.equal(found, output)
    for stage in stages:
        for name in stage.names:
            assert torch.equal(seen.inputs[Key(stage.names[0])], given[name])
            assert (Key(name) in seen.inputs) == (name == stage.names[0])
    entering = block.inputs[1].reshape(-1, 128)
    o_proj = block.module.get_submodule("self_attn.o_proj")
    assert torch.equal(seen.residuals["self_attn.o_proj.weight"], entering)
    after = entering + o_proj(attention["self_attn.o_proj.weight"])
    assert torch.allclose(seen.residuals["mlp.down_proj.weight"], after, atol=1e-6)
    assert seen.residuals.keys() == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_one_stage_alone_is_left_early(tiny: Tiny):
    block = open_block(tiny("llama"))
    stages = block.stages()
    seen, output = observe(block.module, block.inputs[0], block.calls[0], stages[:1])
    assert output is None
    assert list(seen.inputs) == [Key("self_attn.q_proj.weight")]
    only, _ = observe(block.module, block.inputs[0], block.calls[0], [stages[3]])
    assert list(only.inputs) == [Key("mlp.down_proj.weight")]
    assert list(only.residuals) == ["mlp.down_proj.weight"]  # its source is watched, and told of by no input
    everything, _ = observe(block.module, block.inputs[0], block.calls[0], stages, to_end=True)
    same(([only], []), ([everything.only(stages[3])], []))


class Fragile(nn.Module):
    """Two layers. A batch of threes breaks before them, one of sevens between; one row alone skips the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        mark = float(hidden[0, 0])
        if mark == 3:
            raise ValueError("three")
        hidden = self.first(hidden)
        if mark == 7:
            raise ValueError("seven")
        return hidden if len(hidden) == 1 else self.second(hidden)


def fragile(*values: float) -> tuple[Fragile, list[Tensor], list[Call], list[Stage]]:
    torch.manual_seed(0)
    block = Fragile()
    inputs = [torch.full((2, 2), value) for value in values]
    stages = find_stages(block, ["first.weight", "second.weight"], torch.zeros(2, 2), Call((), {}))
    return block, inputs, [Call((), {}) for _ in values], stages


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("value", [3.0, 7.0])
def test_an_error_inside_a_run_reaches_the_caller(workers: int, value: float):
    block, inputs, calls, stages = fragile(0.0, value, 2.0, 5.0)
    text = "three" if value == 3 else "seven"
    runs = Runs(block, inputs, calls, stages, workers)

    def body() -> None:
        walk_through(runs, block, stages, 4, True)

    with pytest.raises(ValueError, match=text):
        within(20, body)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_an_error_of_the_caller_ends_all_runs(workers: int, stage: int):
    block, inputs, calls, stages = fragile(0.0, 2.0, 5.0)

    def body() -> None:
        with Runs(block, inputs, calls, stages, workers) as runs:
            for place in range(stage):
                for batch in range(3):
                    runs.seen(batch, place)
                runs.release(place)
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        within(20, body)


def test_an_error_in_the_last_part_is_told_with_the_outputs():
    block, inputs, calls, _ = fragile(0.0, 7.0)
    stages = [Stage(("first.weight",), True)]

    def body() -> None:
        with Runs(block, inputs, calls, stages, 2) as runs:
            for batch in (0, 1):
                runs.seen(batch, 0)
            runs.release(0)
            runs.outputs()

    with pytest.raises(ValueError, match="seven"):
        within(20, body)


def test_a_stage_that_a_batch_never_comes_by():
    block, _, calls, stages = fragile(0.0, 0.0)
    inputs = [torch.zeros(2, 2), torch.zeros(1, 2)]  # the second is one row, and skips the second layer

    def body() -> tuple[list[Seen], list[Tensor]]:
        return walk_through(Runs(block, inputs, calls, stages, 2), block, stages, 2, False)

    shown, outputs = within(20, body)
    assert [list(seen.inputs) for seen in shown] == [[Key("first.weight")]] * 2 + [[Key("second.weight")], []]
    assert [output.shape for output in outputs] == [(2, 2), (1, 2)]
    kept = walk_through(Kept(block, inputs, calls, stages), block, stages, 2, False)
    same((shown, outputs), kept)


def test_no_more_than_the_workers_compute_at_a_time():
    at_once, most, lock = 0, 0, threading.Lock()
    gate = threading.Semaphore(0)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            gate.acquire(timeout=0.05)
            with lock:
                at_once -= 1
            return self.layer(hidden)

    block = Counting()
    inputs = [torch.zeros(1, 2)] * 6
    stages = [Stage(("layer.weight",), True)]
    runs = Runs(block, inputs, [Call((), {})] * 6, stages, 2)
    within(20, lambda: walk_through(runs, block, stages, 6, False))
    assert most == 2


def test_a_walk_does_not_depend_on_threads_of_torch(tiny: Tiny):
    """Kept runs where it is asked first, which need not be a worker."""
    block = open_block(tiny("llama"))
    stages, count = block.stages(), len(block.inputs)
    expected = walk_through(Kept(block.module, block.inputs, block.calls, stages), block.module, stages, count, False)
    seen: list[int] = []
    hook = block.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        kept = Kept(block.module, block.inputs, block.calls, stages)
        same(within(60, lambda: walk_through(kept, block.module, stages, count, False)), expected)
        runs = Runs(block.module, block.inputs, block.calls, stages, 2)
        same(within(60, lambda: walk_through(runs, block.module, stages, count, False)), expected)
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)
        hook.remove()
