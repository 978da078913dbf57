"""`bitgrain calibrate`, and `quantize --statistics`."""

import json
from pathlib import Path

import pytest

from bitgrain.calibration.statistics_file import MANIFEST
from bitgrain.cli.main import main

pytestmark = pytest.mark.usefixtures("device")

FEW = ("--windows", "2", "--seqlen", "32", "--workers", "1")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the built-in model. Read it, never write to it."""
    from bitgrain.demo import demo_model_path

    out = tmp_path_factory.mktemp("calibrated") / "statistics"
    assert main(["calibrate", str(demo_model_path()), "-o", str(out), "--quiet", *FEW]) == 0
    return out


def test_calibrate_says_what_it_does(run, model: Path, text: Path, tmp_path: Path):
    out = tmp_path / "my statistics"
    ran = run("calibrate", model, "-o", out, "--calibration", text, *FEW)
    assert ran.status == 0
    assert (out / MANIFEST).is_file()
    assert "is written, in" in " ".join(ran.out.split())  # a long path wraps the line
    assert "2 windows of 32 tokens of text.txt" in ran.out
    assert f"--statistics '{out}'" in " ".join(ran.out.split())
    assert "its Hessian is singular" in ran.out
    assert "calibrate" in ran.err  # the progress


def test_json(run, model: Path, tmp_path: Path):
    ran = run("calibrate", model, "-o", tmp_path / "statistics", "--json", *FEW)
    assert ran.json["calibration"]["tokens"] == 64
    assert ran.json["bytes"] == sum(path.stat().st_size for path in (tmp_path / "statistics").iterdir())
    assert all(json.loads(line)["unit"] == "weights" for line in ran.err.splitlines())


def test_quiet_tells_notes_only(run, model: Path, tmp_path: Path):
    ran = run("calibrate", model, "-o", tmp_path / "statistics", "--quiet", *FEW)
    assert ran.out == ""
    assert "its Hessian is singular" in ran.err
    assert "is written" not in ran.err


@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_statistics_serve_every_scheme(run, scheme: str, model: Path, statistics: Path, tmp_path: Path):
    job = (model, "-s", scheme, "--recipe", "fast", "--statistics", statistics)
    planned = run("plan", *job)
    assert planned.status == 0
    assert "calibrated by the statistics" in " ".join(planned.out.split())
    assert run("quantize", *job, "-o", tmp_path / "out", "--quiet").status == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration"]["windows"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--calibration", "builtin"), "--statistics stand in place of text"),
        (("--windows", "3"), "--statistics stand in place of text"),
        (("--bits", "4"), "--bits needs gradients"),
    ],
)
def test_contradictions_are_usage_errors(run, options: tuple[str, ...], words: str, model: Path, statistics: Path):
    ran = run("plan", model, "-s", "W4A16", "--statistics", statistics, *options)
    assert ran.status == 2
    assert words in ran.err


def test_experts_are_asked_for(run, model: Path, tmp_path: Path):
    """They change nothing in a model that has none; what does not exist is said with what does."""
    asked = ("--experts", "nearest", "--expert-tokens", "32")
    assert run("calibrate", model, "-o", tmp_path / "statistics", "--quiet", *FEW, *asked).status == 0
    planned = run("plan", model, "-s", "W4A16", "--recipe", "fast", *asked, "--statistics", tmp_path / "statistics")
    assert planned.status == 0
    assert run("quantize", model, "-s", "W4A16", *asked, "-o", tmp_path / "out", "--quiet").status == 0
    assert "policy: nearest\n  tokens: 32\n" in (tmp_path / "out" / "recipe.yaml").read_text()
    for option, value, words in (
        ("--experts", "most", "invalid choice: 'most'"),
        ("--expert-tokens", "-3", "'-3' is not a whole number of at least 1"),
        ("--expert-tokens", "few", "'few' is not a whole number of at least 1"),
    ):
        for command in (("plan", model, "-s", "W4A16"), ("calibrate", model, "-o", tmp_path / "other")):
            refused = run(*command, option, value)
            assert refused.status == 2
            assert words in refused.err


def test_errors(run, model: Path, statistics: Path, tmp_path: Path):
    ran = run("calibrate", model, "-o", statistics)
    assert ran.status == 1
    assert "exists already" in ran.err
    ran = run("plan", model, "-s", "W4A16", "--recipe", "balanced", "--statistics", statistics)
    assert ran.status == 1
    assert "target in the recipe: needs activations" in " ".join(ran.out.split())
    ran = run("quantize", model, "-s", "W4A16", "--statistics", tmp_path, "-o", tmp_path / "out")
    assert ran.status == 1
    assert "holds no statistics" in ran.err
