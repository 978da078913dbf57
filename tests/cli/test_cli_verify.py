import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("device")


def test_all_is_well(run, model: Path, quantized: Path):
    ran = run("verify", quantized, "--against", model)
    assert ran.status == 0
    told = [line.split("  ")[0] for line in ran.out.splitlines() if not line.startswith(" ")]
    assert told == [*(["ok"] * 4), "not checked"]
    ran = run("verify", quantized, "--json")
    assert [check["name"] for check in ran.json] == ["files", "layers", "logits", "engines"]


def test_damage_is_status_1(run, quantized: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(quantized, out)
    (out / "recipe.yaml").write_text("scheme: W8A16\n")
    ran = run("verify", out)
    assert ran.status == 1
    assert "FAILED files recipe.yaml has changed" in " ".join(ran.out.split())


def test_what_cannot_be_checked_says_why(run, model: Path, tmp_path: Path):
    assert run("quantize", model, "-s", "W8A16INT16", "-o", tmp_path / "out", "--quiet").status == 0
    ran = run("verify", tmp_path / "out")
    assert ran.status == 0
    assert "not checked layers no other library reads quant_method bitgrain" in " ".join(ran.out.split())


def test_a_model_that_is_not_quantized(run, model: Path):
    ran = run("verify", model)
    assert ran.status == 1
    assert "is not quantized" in ran.err
