import json
from pathlib import Path

import pytest

import bitgrain.pipeline.quantize

pytestmark = pytest.mark.usefixtures("device")


def test_quantize_says_what_it_does(run, model: Path, tmp_path: Path):
    out = tmp_path / "my out"
    ran = run("quantize", model, "--scheme", "W2A16", "--out", out)
    assert ran.status == 0
    assert (out / "manifest.json").is_file()
    assert "W2A16 on 74.9% of the parameters, solver rtn" in ran.out
    assert "is written, in" in ran.out
    assert "lowest SQNR" in ran.out
    assert "warning: 21 layers have an SQNR below 5 dB: model.layers.{0-2}.mlp" in ran.out
    assert f"\n  bitgrain verify '{out}' --against {model}\n" in ran.out  # whole, to be copied
    assert "quantize model: done after" in ran.err


def test_json(run, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    ran = run("quantize", model, "-s", "W8A8", "-o", out, "--json")
    assert ran.status == 0
    assert ran.json["out"] == str(out)
    assert ran.json["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert ran.json["warnings"] == []
    assert len(ran.json["worst_layers"]) == 3
    events = [json.loads(line) for line in ran.err.splitlines()]
    assert events[-1]["event"] == "finish"
    assert events[-1]["complete"] is True


def test_quiet_says_warnings_only(run, model: Path, tmp_path: Path):
    ran = run("quantize", model, "-s", "W8A16", "-o", tmp_path / "a", "--quiet")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    ran = run("quantize", model, "-s", "W2A16", "-o", tmp_path / "b", "--quiet")
    assert ran.out == ""
    assert ran.err.startswith("warning: 21 layers")


def test_an_existing_folder_is_left_alone(run, model: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    ran = run("quantize", model, "-s", "W4A16", "-o", tmp_path / "out")
    assert ran.status == 1
    assert "exists already, and is never overwritten" in ran.err
    assert ran.out == ""
    ran = run("quantize", model, "-s", "W4A16", "-o", tmp_path / "no" / "out")
    assert ran.status == 1
    assert "parent folder does not exist" in ran.err


def test_problems_stop_it(run, shared: Path, tmp_path: Path):
    ran = run("quantize", shared / "models" / "stories260k", "-s", "W4A16", "-o", tmp_path / "out")
    assert ran.status == 1
    assert ran.err.startswith("error: this cannot be done as asked:\n  model.layers.{0-4}.mlp.down_proj: weight")
    assert list(tmp_path.iterdir()) == []


def test_no_such_device(run, model: Path, tmp_path: Path):
    ran = run("quantize", model, "-s", "W4A16", "-o", tmp_path / "out", "--device", "toaster")
    assert ran.status == 1
    assert "unknown device 'toaster'" in ran.err


def test_ctrl_c_says_how_to_go_on(run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    solve = bitgrain.pipeline.quantize._solve_unit
    calls: list[str] = []

    def interrupted(plan, unit, *rest):
        calls.append(unit.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(plan, unit, *rest)

    monkeypatch.setattr(bitgrain.pipeline.quantize, "_solve_unit", interrupted)
    command = ("quantize", model, "-s", "W4A16", "-o", tmp_path / "out", "--workers", "1")
    ran = run(*command)
    assert ran.status == 130
    assert ran.err.endswith("stopped: what is done is in out.partial; the same command goes on from here\n")
    monkeypatch.undo()
    assert run(*command).status == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_methods_by_name(run, model: Path, text: Path, tmp_path: Path):
    options = ("--calibration", text, "--windows", "16", "--seqlen", "32")
    ran = run("quantize", model, "-s", "W8A8_RPTQ", "--recipe", "rptq", *options, "-o", tmp_path / "out")
    assert ran.status == 0
    assert "W8A8_RPTQ on" in ran.out
    assert run("verify", tmp_path / "out", "--against", model).status == 0
    ran = run("eval", tmp_path / "out", "--against", model, "--text", text, "--seqlen", "32", "--json", "-")
    assert 0 < ran.json["kl"] < 0.1
    ran = run("plan", model, "-s", "W8A8", "--recipe", "zeroquant", *options)
    assert ran.status == 0
    assert "compressed-tensors layout" in ran.out
