"""Same input, same bytes: for any number of workers and threads, after a resume, and from the written recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.errors import OutputError, ResumeError
from bitgrain.pipeline import planning
from bitgrain.pipeline import quantize as job
from bitgrain.recipes import make_recipe

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_UNIT_BYTES", 50_000)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4", "W8A8"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_workers_and_threads_do_not_matter(tiny: Tiny, tmp_path: Path, small_units: None, name: str, scheme: str):
    reference: dict[str, bytes] | None = None
    before = torch.get_num_threads()
    try:
        for workers, threads in ((1, 1), (2, 2), (4, 1), (3, 4)):
            torch.set_num_threads(threads)
            out = tmp_path / f"out-{workers}-{threads}"
            bitgrain.quantize(tiny(name), out, scheme, workers=workers, max_shard_bytes=200_000)
            assert torch.get_num_threads() == threads
            reference = reference or zoo.contents(out)
            assert zoo.contents(out) == reference
    finally:
        torch.set_num_threads(before)


def test_unit_size_does_not_matter(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for size in (1, 100_000, 64_000_000):
        monkeypatch.setattr(planning, "_UNIT_BYTES", size)
        bitgrain.quantize(tiny("mixtral"), tmp_path / str(size), "NVFP4", workers=2)
        found.append(zoo.contents(tmp_path / str(size)))
    assert found[0] == found[1] == found[2]


def test_the_written_recipe_gives_the_same_bytes(tiny: Tiny, tmp_path: Path):
    recipe = make_recipe(scheme="W4A16", rules=[{"match": "down_proj", "scheme": "W8A16"}], range="mse")
    bitgrain.quantize(tiny("llama"), tmp_path / "first", recipe=recipe, workers=1)
    bitgrain.quantize(tiny("llama"), tmp_path / "again", recipe=tmp_path / "first" / "recipe.yaml", workers=1)
    assert zoo.contents(tmp_path / "first") == zoo.contents(tmp_path / "again")


class Interrupt(Exception):
    """What a test throws into a job."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    real, count = JobFolder.commit_unit, 0

    def commit(self: JobFolder, *args: Any, **more: Any) -> None:
        nonlocal count
        if count == units:
            raise Interrupt
        count += 1
        real(self, *args, **more)

    monkeypatch.setattr(JobFolder, "commit_unit", commit)


def test_resume_does_only_what_is_left(tiny: Tiny, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch):
    bitgrain.quantize(tiny("llama"), tmp_path / "whole", "W4A16", workers=1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupt):
            bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    solved: list[str] = []
    real = job._solve_unit

    def watched(plan: Any, unit: Any, *more: Any) -> Any:
        solved.append(unit.name)
        return real(plan, unit, *more)

    monkeypatch.setattr(job, "_solve_unit", watched)
    result = bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=4)
    assert len(solved) == len(result.plan.units) - 3
    assert zoo.contents(tmp_path / "out") == zoo.contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_changed_settings_are_refused_with_what_changed(
    tiny: Tiny, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupt):
            bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    with pytest.raises(ResumeError) as caught:
        bitgrain.quantize(tiny("llama"), tmp_path / "out", "W8A16", on_indivisible="skip", workers=1)
    lines = str(caught.value).splitlines()
    assert '  recipe / scheme: "W4A16" -> "W8A16"' in lines
    assert '  recipe / on_indivisible: "error" -> "skip"' in lines
    assert "--restart" in lines[-1]
    assert not (tmp_path / "out").exists()
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W8A16", on_indivisible="skip", workers=1, restart=True)
    bitgrain.quantize(tiny("llama"), tmp_path / "fresh", "W8A16", on_indivisible="skip", workers=1)
    assert zoo.contents(tmp_path / "out") == zoo.contents(tmp_path / "fresh")


def test_a_changed_source_is_refused(tiny: Tiny, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch):
    source = zoo.edited(tiny("llama"), tmp_path / "llama")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupt):
            bitgrain.quantize(source, tmp_path / "out", "W4A16", workers=1)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(ResumeError, match=r"source / files / model\.safetensors / mtime_ns"):
        bitgrain.quantize(source, tmp_path / "out", "W4A16", workers=1)
    zoo.edit_config(source, rope_theta=20000.0)
    with pytest.raises(ResumeError, match="\n  config: "):
        bitgrain.quantize(source, tmp_path / "out", "W4A16", workers=1)


def test_an_error_in_one_worker_ends_the_run_resumable(
    tiny: Tiny, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
):
    """A full disk in the middle of the job: the error is told, and the same call goes on when there is room."""
    bitgrain.quantize(tiny("llama"), tmp_path / "whole", "W4A16", workers=1)
    real, count = JobFolder.commit_unit, 0

    def full(self: JobFolder, *args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise OutputError("no space left on the disk")
        real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "commit_unit", full)
        with pytest.raises(OutputError, match="no space left"):
            bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=2)
    assert not (tmp_path / "out").exists()
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=2)
    assert zoo.contents(tmp_path / "out") == zoo.contents(tmp_path / "whole")


def test_a_finished_result_is_never_overwritten(tiny: Tiny, tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1)
    before = zoo.contents(tmp_path / "out")
    for restart in (False, True):
        with pytest.raises(OutputError, match="exists already, and is never overwritten"):
            bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", workers=1, restart=restart)
    assert zoo.contents(tmp_path / "out") == before
