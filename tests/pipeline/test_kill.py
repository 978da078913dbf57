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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments(tmp_path: Path):
    model = zoo.save("llama", tmp_path / "model", num_hidden_layers=4, hidden_size=128, intermediate_size=128)
    command = [sys.executable, str(DRIVER), str(model), str(tmp_path), "2026", str(KILLS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["faults"] == []
    assert result["killed"] == KILLS
    assert result["resumed"] >= 3
    assert result["stages"] >= 3  # it died at different points of the job
    assert {"config.json", "manifest.json", "model.safetensors.index.json", "recipe.yaml"} <= set(result["files"])
