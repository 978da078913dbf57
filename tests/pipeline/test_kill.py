"""A job killed with SIGKILL at any moment goes on where it was, and ends in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

DRIVER = Path(__file__).with_name("killed_runs.py")
KILLS = 20
RECIPE = """
scheme: W4A16
solver: {name: gptq, sweeps: 1}
target: {}
tuning: {end_to_end: {steps: 2, checks: 1}}
calibration: {windows: 4, seqlen: 32, batch: 1, text: TEXT}
rules: [{match: lm_head, scheme: W8A16}]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments(tmp_path: Path):
    model = zoo.save("llama", tmp_path / "model", num_hidden_layers=4, hidden_size=128, intermediate_size=128)
    check(model, tmp_path, KILLS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_of_a_calibrated_job(tmp_path: Path):
    """In front of blocks, behind them, while the whole model is tuned, while the files are written."""
    model = zoo.save("llama", tmp_path / "model", num_hidden_layers=4, hidden_size=128, intermediate_size=128)
    zoo.save_tokenizer(model)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TEXT", str(tmp_path / "text.txt")))
    check(model, tmp_path, KILLS // 2, recipe)


def check(model: Path, folder: Path, kills: int, *recipe: Path) -> None:
    command = [sys.executable, str(DRIVER), str(model), str(folder), "2026", str(kills), *map(str, recipe)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["faults"] == []
    assert result["killed"] == kills
    assert result["resumed"] >= 3
    assert result["stages"] >= 3  # it died at different points of the job
    assert {"config.json", "manifest.json", "model.safetensors.index.json", "recipe.yaml"} <= set(result["files"])
