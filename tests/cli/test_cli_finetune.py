"""`bitgrain finetune` and `bitgrain merge`."""

import json
import sys
from pathlib import Path

import pytest

from bitgrain.cli.main import main

pytestmark = pytest.mark.usefixtures("device")

pytest.importorskip("peft")
FEW = ("--steps", "2", "--batch", "1", "--seqlen", "32", "--rank", "2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitgrain.demo import demo_model_path

    out = tmp_path_factory.mktemp("nf4") / "out"
    assert main(["quantize", str(demo_model_path()), "-s", "NF4", "-o", str(out), "--quiet"]) == 0
    return out


def test_finetune_and_merge(run, base: Path, text: Path, tmp_path: Path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    ran = run("finetune", base, "--text", text, "-o", adapter, "--targets", "q_proj, v_proj", *FEW)
    assert ran.status == 0
    assert "is written, in" in " ".join(ran.out.split())
    assert "before," in ran.out
    assert f"bitgrain merge {base} {adapter} -o MODEL" in ran.out
    assert "fine-tune: " in ran.err  # the progress
    assert sorted(json.loads((adapter / "adapter_config.json").read_text())["target_modules"]) == ["q_proj", "v_proj"]
    ran = run("merge", base, adapter, "-o", merged)
    assert (ran.status, ran.err) == (0, "")
    assert f"bitgrain quantize {merged}" in ran.out
    assert (merged / "tokenizer.json").is_file()
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


def test_json(run, base: Path, text: Path, tmp_path: Path):
    ran = run("finetune", base, "--text", text, "-o", tmp_path / "out", "--optimizer", "adamw8bit", "--json", *FEW)
    assert ran.json["steps"] == len(ran.json["losses"]) == 2
    assert ran.json["base_bytes"] < ran.json["dense_bytes"]
    assert json.loads(ran.err.splitlines()[-1])["complete"]


@pytest.mark.parametrize("option", [("--rate", "0"), ("--alpha", "x"), ("--steps", "0"), ("--optimizer", "lion")])
def test_bad_options(run, base: Path, text: Path, option: tuple[str, str]):
    ran = run("finetune", base, "--text", text, "-o", "out", *option)
    assert ran.status == 2
    assert option[0] in ran.err


def test_errors_are_one_line(run, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = run("finetune", base, "--text", text, "-o", tmp_path / "out", *FEW, "--batch", "1000")
    assert (ran.status, ran.out) == (1, "")
    assert "one batch needs 1000" in ran.err
    monkeypatch.setitem(sys.modules, "peft", None)
    ran = run("finetune", base, "--text", text, "-o", tmp_path / "out", *FEW)
    assert (ran.status, ran.err.splitlines()) == (
        1,
        ["error: LoRA needs the package peft: pip install 'bitgrain[peft]'"],
    )
