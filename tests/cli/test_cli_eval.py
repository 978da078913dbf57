import json
import math
import shutil
from pathlib import Path

import pytest

from bitgrain.evaluation.language import Evaluation

pytestmark = pytest.mark.usefixtures("device")

KEYS = {
    *("perplexity", "base_perplexity", "kl", "kl_p99", "top1", "tokens_per_s"),
    *("tokens", "windows", "seqlen"),
}


def test_against_the_original(run, model: Path, quantized: Path, text: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    options = ("--text", text, "--seqlen", "64", "--windows", "4", "--json", file)
    ran = run("eval", quantized, "--against", model, *options)
    assert ran.status == 0
    figures = json.loads(file.read_text())
    assert set(figures) == KEYS
    assert 0 < figures["kl"] < 0.1
    assert 0.5 < figures["top1"] < 1
    assert figures["tokens"] == 256
    assert "4 windows of 64 tokens" in ran.out
    assert f"{figures['perplexity']:.4g}" in ran.out
    assert "KL divergence" in ran.out
    assert f"{100 * figures['top1']:.1f}%" in ran.out


def test_alone_as_json_on_stdout(run, quantized: Path, text: Path):
    ran = run(
        "eval", quantized, "--text", text, "--seqlen", "64", "--windows", "2", "--json", "-", "--dtype", "float32"
    )
    assert ran.status == 0
    assert ran.err == ""
    assert set(ran.json) == KEYS
    assert ran.json["kl"] is None
    assert ran.json["perplexity"] > 1


def test_infinite_figures_are_null(run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    found = Evaluation(math.inf, 2.0, math.inf, math.nan, 0.5, 10.0, 64, 1, 64)
    monkeypatch.setattr("bitgrain.api.evaluate_variants", lambda *_, **__: [found])
    ran = run("eval", model, "--against", model, "--text", text, "--json", "-")
    assert (ran.json["perplexity"], ran.json["kl"], ran.json["kl_p99"]) == (None, None, None)
    assert "beyond float64" in run("eval", model, "--against", model, "--text", text).out


def test_caches_and_attention_make_a_table(run, model: Path, text: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    options = ("--text", text, "--seqlen", "96", "--windows", "3", "--json", file)
    ran = run("eval", model, "--kv-cache", "int8", "kivi-int2", "--attention", "int8-fp8", *options)
    assert ran.status == 0
    figures = json.loads(file.read_text())
    assert list(figures) == ["kv cache int8", "kv cache kivi-int2", "attention int8-fp8"]
    assert set(figures["kv cache int8"]) == KEYS
    assert 0 < figures["kv cache int8"]["kl"] < figures["kv cache kivi-int2"]["kl"]
    assert 0 < figures["attention int8-fp8"]["kl"] < 0.01
    assert [name for line in ran.out.splitlines() for name in figures if line.startswith(name)] == list(figures)
    ran = run("eval", model, "--kv-cache", "int5", "--text", text)
    assert ran.status == 1
    assert "unknown KV cache scheme 'int5'; did you mean int" in ran.err
    ran = run("eval", model, "--attention", "fp8", "--text", text)
    assert ran.status == 1
    assert "unknown attention scheme 'fp8'" in ran.err


def test_special_tokens_reach_the_windows(run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []

    def evaluate(*_, special_tokens: bool, **__) -> list[Evaluation]:
        seen.append(special_tokens)
        return [Evaluation(2.0, None, None, None, None, 10.0, 64, 1, 64)]

    monkeypatch.setattr("bitgrain.api.evaluate_variants", evaluate)
    run("eval", model, "--text", text)
    run("eval", model, "--text", text, "--special-tokens")
    assert seen == [False, True]


def test_bad_inputs(run, model: Path, text: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    ran = run("eval", model, "--text", short)
    assert ran.status == 1
    assert "give a longer text or a shorter window" in ran.err
    ran = run("eval", model, "--text", tmp_path / "none.txt")
    assert "does not exist" in ran.err
    ran = run("eval", model, "--text", text, "--json", tmp_path / "no" / "figures.json")
    assert ran.status == 1
    assert "its folder does not exist" in ran.err
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    ran = run("eval", bare, "--text", text)
    assert ran.status == 1
    assert "tokenizer missing" in ran.err
