"""Quantization-aware training as the last stage of a job: it helps, resumes to the same bytes, and survives NaN."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.api import training_recipe
from bitgrain.errors import ModelError, RecipeError, TextError, TrainingError
from bitgrain.pipeline.blockwise import train as training_job
from bitgrain.pipeline.blockwise.work import Work
from bitgrain.progress import Progress
from bitgrain.recipes import get_scheme, load_recipe
from bitgrain.recipes.steps import read_step
from bitgrain.report.result import warning_lines
from calibrated_jobs import HEAD, SOLVER, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
TRAINING = {"steps": 4, "checks": 2, "validation": 2, "batch": 2, "rate": 0.001, "scale_rate": 0.002, "warmup": 0}
ROTATED = {"transforms": [{"name": "rotate", "r4": True}]}


def job(text: Path, scheme: str = "W2A16", training: dict[str, Any] | None = None, **changes: Any) -> Any:
    tuning = {"training": {**TRAINING, **(training or {})}, **changes.pop("tuning", {})}
    return recipe_of("train", text, scheme, solver=SOLVER, tuning=tuning, **changes)


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in zoo.contents(out).items() if name.endswith(".safetensors")}


@pytest.fixture(autouse=True)
def saves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_job, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(training_job, "_SAVE_SHARE", 0.0)


class Interrupt(Exception):
    """What a test throws into a job."""


class Interrupting(Progress):
    """Throws at the n-th step of the training; told: (steps before, all, the last note)."""

    def __init__(self, at: int = 0) -> None:
        self.left, self.unit = at, ""
        self.told: list[tuple[float, float, str]] = []

    def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
        self.unit = unit
        if unit == "steps":
            self.told.append((done, total, ""))

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        if self.unit == "steps":
            self.told[-1] = (*self.told[-1][:2], note)
            self.left -= 1
            if self.left == 0:
                raise Interrupt

    def finish(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "W2A16"), ("llama", "W4A4"), ("gpt2", "TERNARY"), ("mixtral", "W2A16")]
)
def test_training_lowers_the_loss(readable: Make, text: Path, tmp_path: Path, name: str, scheme: str):
    """On text of its own, in files that load as those of any other job."""
    changes = {"num_local_experts": 2} if name == "mixtral" else {}
    settings = {"steps": 10, "batch": 4, "validation": 4}
    rotated = ROTATED if scheme == "W4A4" else {}
    made = run(readable(name, **changes), tmp_path / "out", job(text, scheme, settings, **rotated))
    told = made.manifest["training"]
    assert told["best_loss"] < 0.95 * told["first_loss"]
    assert told["best_step"] > 0
    assert told["text"]["windows"] > 20
    assert all(check.ok is not False for check in bitgrain.verify(made.out, against=readable(name, **changes)))
    assert bool(made.manifest.get("online_rotations")) == (scheme == "W4A4")


def test_the_recipe_rotates_what_its_inputs_ask_for():
    wanted = {"W2A16": [], "W4A8": [{"r4": False}], "W4A4": [{"r4": True, "learn": 200}]}
    for scheme, expected in wanted.items():
        recipe = load_recipe("train", scheme=scheme).for_schemes([get_scheme(scheme)])
        rotations = [read_step(step).transform for step in recipe.transforms if read_step(step).name == "rotate"]
        assert [
            {key: getattr(one, key) for key in want} for one, want in zip(rotations, expected, strict=True)
        ] == expected


def test_what_it_measured_is_what_was_written(readable: Make, text: Path, tmp_path: Path):
    """The loss of the best state, on the windows held back, computed anew from the files."""
    model = readable("llama")
    made = run(model, tmp_path / "out", job(text, "W4A4", **ROTATED))
    base, found = (
        bitgrain.load(model, device="cpu"),
        bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"),
    )
    ids = made.plan.training.ids  # type: ignore[union-attr]
    held = training_job.held_back(len(ids), made.plan.recipe.tuning.training_settings())  # type: ignore[arg-type]
    with torch.no_grad():
        losses = [
            float(training_job.kl_divergence(found(input_ids=ids[[i]]).logits, base(input_ids=ids[[i]]).logits))
            for i in held
        ]
    assert sum(losses) / len(losses) == pytest.approx(made.manifest["training"]["best_loss"], rel=1e-3)


def test_interrupted_at_every_step_it_ends_in_the_same_bytes(readable: Make, text: Path, tmp_path: Path):
    settings = job(text, rules=[HEAD], tuning={"end_to_end": {"steps": 2, "checks": 1, "validation": 2}})
    run(readable("llama"), tmp_path / "whole", settings)
    out, interrupted = tmp_path / "out", 0
    progress = Interrupting()
    for at in itertools.count(1):
        progress = Interrupting(at)
        try:
            run(readable("llama"), out, settings, progress=progress)
            break
        except Interrupt:
            interrupted += 1
            assert not out.exists()
    assert interrupted >= 3
    assert progress.told[-1][0] > 0  # an earlier run's steps were not done again
    assert progress.told[-1][2].startswith("loss ")
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("before", [True, False])
def test_interrupted_at_every_file_it_ends_in_the_same_bytes(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
):
    settings = job(text, "W4A4", **ROTATED)
    run(readable("llama"), tmp_path / "whole", settings)
    real, left = Work.save, {"latent-block-00001": 1, "training": 3, "trained": 2}

    def save(self: Work, name: str, *more: Any) -> None:
        if not before:
            real(self, name, *more)
        if left.get(name, 0):
            left[name] -= 1
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
    assert left["latent-block-00001"] == left["training"] == 0
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")


def test_nan_stops_with_one_error_and_the_same_command_ends_with_the_best_state(
    readable: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
):
    settings = job(text, training={"batch": 4})
    run(readable("llama"), tmp_path / "whole", settings)
    real, calls = training_job.kl_divergence, 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(*args) * (math.nan if calls >= 13 else 1.0)  # four windows a step: the fourth

    monkeypatch.setattr(training_job, "kl_divergence", failing)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"in step 4.*The best state so far \(step [02], .* the same command ends"):
        run(readable("llama"), out, settings)
    assert not out.exists()
    monkeypatch.setattr(training_job, "kl_divergence", real)
    made = run(readable("llama"), out, settings)
    told = made.manifest["training"]
    assert "in step 4" in told["stopped"]
    assert any("in step 4" in line for line in warning_lines(made))
    assert told["best_step"] in ((2,) if device == "cpu" else (0, 2))  # which is nearer is a matter of the last bits
    assert all(bool(p.isfinite().all()) for p in bitgrain.load(out, device="cpu", execution="dequantize").parameters())
    assert weights(out) != weights(tmp_path / "whole")


def test_rates_that_ruin_everything_leave_the_start(readable: Make, text: Path, tmp_path: Path):
    made = run(readable("llama"), tmp_path / "out", job(text, training={"rate": 1.0, "scale_rate": 0.5}))
    assert made.manifest["training"]["best_step"] == 0
    plain = recipe_of("train", text, "W2A16", solver=SOLVER, tuning={"training": None})
    run(readable("llama"), tmp_path / "plain", plain)
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_a_text_shorter_than_a_batch_is_one_error(readable: Make, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("It was a bright cold day in April. " * 10)
    long = tmp_path / "long.txt"
    long.write_text("It was a bright cold day in April. " * 100)
    recipe = job(long, training={"text": str(short), "seqlen": 64, "batch": 8})
    with pytest.raises(TextError, match=r"short.txt\) holds 5 windows of 64 tokens, less than one batch of 8"):
        run(readable("llama"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_next_tokens_can_be_learned_instead(readable: Make, text: Path, tmp_path: Path):
    told = run(readable("llama"), tmp_path / "out", job(text, training={"loss": "next_token", "steps": 8}))
    assert told.manifest["training"]["best_loss"] < told.manifest["training"]["first_loss"]


def test_an_encoder_cannot_be_trained(readable: Make, text: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"predicts no tokens; leave tuning\.training out"):
        run(readable("bert"), tmp_path / "out", job(text))


def test_the_python_face_is_the_recipe(readable: Make, text: Path, tmp_path: Path):
    given = {"training": TRAINING, "text": text, "workers": 1}
    start = load_recipe("fast", scheme="W2A16", calibration={"windows": 5, "seqlen": 24, "batch": 2})
    told = bitgrain.train(readable("llama"), tmp_path / "out", recipe=start, **given)
    assert told.manifest["training"]["best_loss"] <= told.manifest["training"]["first_loss"]
    recipe = training_recipe("W4A8", text, training={"steps": 3, "seqlen": 64})
    assert recipe.tuning.training == {"steps": 3, "seqlen": 64}
    assert recipe.calibration.seqlen == 64
    with pytest.raises(RecipeError, match="has no setting 'stepps'"):
        training_recipe("W4A8", text, training={"stepps": 3})


def test_the_plan_tells_what_training_takes(readable: Make, text: Path):
    without = bitgrain.plan(readable("llama"), recipe=job(text, tuning={"training": None}))
    plan = bitgrain.plan(readable("llama"), recipe=job(text, training={"at_once": 5000}))
    assert without.training is None
    assert plan.peak_ram > without.peak_ram
    assert any("trained for 4 steps of 2 windows of 24 tokens" in note for note in plan.notes)
