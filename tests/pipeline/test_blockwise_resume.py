"""The same bytes in every way to get there: any number of workers, any memory, killed and resumed anywhere."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from bitgrain.pipeline.blockwise import block as block_job
from bitgrain.pipeline.blockwise.work import Work
from bitgrain.progress import Progress
from calibrated_jobs import HEAD, SOLVER, TUNED, activations, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "balanced"), ("mixtral", "balanced"), ("bert", "balanced"), ("llama", "fast")]
)
def test_workers_threads_and_memory_do_not_matter(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipe: str
):
    model = readable(name, **({"num_local_experts": 2} if name == "mixtral" else {}))
    reference: dict[str, bytes] | None = None
    before = torch.get_num_threads()
    try:
        for workers, threads, lean in ((1, 1, False), (2, 3, False), (3, 2, True)):
            if lean:  # no activations are held: every stage is run anew
                monkeypatch.setattr(block_job, "_HOLD_BYTES", 0)
            torch.set_num_threads(threads)
            out = tmp_path / f"out-{workers}-{lean}"
            run(model, out, recipe_of(recipe, text, solver=SOLVER), workers)
            reference = reference or zoo.contents(out)
            assert zoo.contents(out) == reference
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_memory_does_not_matter_for_full_activations(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
):
    """Runs that see the original block must not see the layers that were already replaced."""
    parallel = recipe_of(recipe, text, solver="gptq", **activations("full"))
    run(readable("llama"), tmp_path / "held", parallel)
    monkeypatch.setattr(block_job, "_HOLD_BYTES", 0)
    run(readable("llama"), tmp_path / "lean", parallel)
    assert zoo.contents(tmp_path / "held") == zoo.contents(tmp_path / "lean")


class Interrupt(Exception):
    """What a test throws into a job."""


def run_interrupted(model: Path, out: Path, settings: Any, moments: Iterable[int]) -> int:
    """A job that is interrupted at each of these steps in turn until it is whole, before which `out` is not there; and
    how often it was."""
    for count, at in enumerate(moments):
        try:
            run(model, out, settings, workers=1 + at % 2, progress=Interrupting(at))
        except Interrupt:
            assert not out.exists()
            continue
        return count
    raise AssertionError("it was never whole")


class Interrupting(Progress):
    """Throws at the n-th step, counted over all runs."""

    def __init__(self, at: int = 0) -> None:
        self.left = at
        self.told: list[tuple[str, float, float, float]] = []  # unit, total, done before, done

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        self.told.append((unit, total, done, done))

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        unit, total, before, done = self.told[-1]
        self.told[-1] = (unit, total, before, done + amount)
        self.left -= 1
        if self.left == 0:
            raise Interrupt

    def finish(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "recipe", "changes"), [("bert", "balanced", {}), ("llama", "fast", {}), ("llama", "best", TUNED)]
)
def test_a_job_interrupted_at_every_step_ends_in_the_same_bytes(
    readable: Make, text: Path, tmp_path: Path, name: str, recipe: str, changes: dict[str, Any]
):
    """One interruption after the other, each a few steps further than the last one."""
    settings = recipe_of(recipe, text, solver="gptq", **changes)
    run(readable(name), tmp_path / "whole", settings)
    out = tmp_path / "out"
    assert run_interrupted(readable(name), out, settings, itertools.count(1, 3)) >= 4
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("before", [True, False])
def test_a_job_interrupted_at_every_file_of_its_own_ends_in_the_same_bytes(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
):
    """Around every moment at which something becomes durable: a block, the hidden states behind it, the end."""
    settings = recipe_of("best", text, solver="gptq", rules=[HEAD], **TUNED)
    run(readable("llama"), tmp_path / "whole", settings)
    real, names = Work.save, list[str]()

    def save(self: Work, name: str, *more: Any) -> None:
        if not before:
            real(self, name, *more)
        if name not in names:
            names.append(name)
            raise Interrupt
        if before:
            real(self, name, *more)

    monkeypatch.setattr(Work, "save", save)
    out = tmp_path / "out"
    while not out.exists():
        try:
            run(readable("llama"), out, settings)
        except Interrupt:
            assert not out.exists()
    assert names == ["hidden-00001", "block-00000", "hidden-00002", "block-00001", "outside", "tuned", "finished"]
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")


def test_a_resumed_job_solves_only_what_is_left(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    solved: list[int] = []
    real = block_job.BlockSolver.solve

    def watched(self: Any, index: int, *more: Any) -> Any:
        solved.append(index)
        return real(self, index, *more)

    monkeypatch.setattr(block_job.BlockSolver, "solve", watched)
    with pytest.raises(Interrupt):  # llama has 7 layers in a block
        run(readable("llama"), tmp_path / "out", recipe_of("fast", text), progress=Interrupting(9))
    assert solved == [0, 1]
    folder = tmp_path / "out.partial" / "work"
    assert sorted(path.name for path in folder.iterdir()) == ["block-00000.safetensors", "hidden-00001.safetensors"]
    progress = Interrupting()
    result = run(readable("llama"), tmp_path / "out", recipe_of("fast", text), progress=progress)
    assert solved == [0, 1, 1]
    (unit, total, before, done), (last, *_) = progress.told  # what was done before is no work of this run
    sizes = {name: layer.elements for name, layer in result.plan.quantized.items()}
    assert (unit, total, done) == ("weights", sum(sizes.values()), sum(sizes.values()))
    assert before == sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert last == "bytes"
