"""`bitgrain train`: the files of `quantize`, the progress with its loss, and its errors."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("device")

FEW = ("--steps", "3", "--batch", "2", "--seqlen", "32", "--windows", "20", "--workers", "1")


def test_train_writes_what_quantize_does_and_shows_the_loss(run, model: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    ran = run("train", model, "-s", "W4A16", "--recipe", "fast", "--text", text, "-o", out, "--json", *FEW)
    assert ran.status == 0, ran.err
    told = [json.loads(line) for line in ran.err.splitlines()]
    steps = [line for line in told if line["title"].startswith("train")]
    assert steps[-1]["done"] == steps[-1]["total"] == 3
    assert any(line["note"].startswith("loss ") and line["eta_s"] is not None for line in steps)
    again = run("train", model, "-s", "W4A16", "--recipe", "fast", "--text", text, "-o", tmp_path / "told", *FEW)
    assert "on text held back, after" in " ".join(again.out.split())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["training"]["best_loss"] <= manifest["training"]["first_loss"]
    assert "training:" in (out / "recipe.yaml").read_text()
    assert run("verify", out, "--against", model).status == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--text", "builtin"), "--scheme"),
        (("-s", "W4A16"), "--text"),
        (("-s", "W4A16", "--text", "builtin", "--loss", "mse"), "invalid choice"),
    ],
)
def test_a_wrong_command_line(run, model: Path, tmp_path: Path, arguments: tuple[str, ...], says: str):
    ran = run("train", model, "-o", tmp_path / "out", *arguments)
    assert ran.status == 2
    assert says in ran.err


def test_a_text_shorter_than_a_batch(run, model: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a little girl who had a red ball. " * 30)
    ran = run(
        "train", model, "-s", "W4A16", "--text", short, "-o", tmp_path / "out", "--batch", "100", "--seqlen", "32"
    )
    assert ran.status == 1
    assert "less than one batch of 100" in " ".join(ran.err.split())
    assert not (tmp_path / "out").exists()
