import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("device")


def test_inspect(run, model: Path, tmp_path: Path):
    file = tmp_path / "found.json"
    ran = run("inspect", model, "--layers", "q_proj", "--json", file)
    assert ran.status == 0
    assert "self_attn.q_proj" in ran.out
    assert "Recommendation" in ran.out
    found = json.loads(file.read_text())
    assert len(found["layers"]) == 3
    ran = run("inspect", model, "--layers", "q_proj", "--all", "--json", "-")
    assert ran.err == ""
    assert len(ran.json["layers"]) == 3


def test_with_a_text(run, model: Path, text: Path):
    ran = run("inspect", model, "--layers", "q_proj", "--text", text, "--seqlen", "64", "--windows", "2")
    assert ran.status == 0
    assert "2 windows of 64 tokens" in ran.out


def test_errors(run, model: Path, quantized: Path):
    ran = run("inspect", model, "--layers", "q_porj")
    assert ran.status == 1
    assert "did you mean 'q_proj'?" in ran.err
    ran = run("inspect", quantized)
    assert ran.status == 1
    assert "already quantized" in ran.err
    assert run("inspect", model, "--max-rows", "0").status == 2
