import json
from pathlib import Path

import pytest
import torch

from bitgrain.cli import demo

pytestmark = pytest.mark.usefixtures("device")


def test_the_windows_come_from_all_over_the_text(model: Path):
    few, every = demo.held_out_windows(model, 8), demo.held_out_windows(model, 100_000)
    assert few.shape == (8, 512)
    assert len(every) > 200
    where = [int((every == window).all(1).nonzero()[0]) for window in few]
    assert where == [i * len(every) // 8 for i in range(8)]


def test_the_demo(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SCHEMES", ("W8A16", "INT4_G32", "W4A16"))
    threads = torch.get_num_threads()
    ran = run("demo", "--windows", "2", "--out", tmp_path / "kept", "--json", tmp_path / "demo.json")
    assert torch.get_num_threads() == threads
    assert ran.status == 0
    assert "a Llama of 1.97 M parameters" in ran.out
    assert "2 windows of 512 tokens" in ran.out
    for row in ("the original", "W8A16          int8 channel", "INT4_G32       int4 g32"):
        assert row.split()[0] in ran.out
    assert "int4, groups of 32 instead of 128: KL" in ran.out
    assert "bitgrain quantize MODEL" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["INT4_G32", "W4A16", "W8A16"]
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert [row["scheme"] for row in figures["rows"]] == ["W8A16", "INT4_G32", "W4A16"]
    by_name = {row["scheme"]: row["kl"] for row in figures["rows"]}
    assert by_name["W8A16"] < by_name["INT4_G32"] < by_name["W4A16"]


def test_every_scheme_of_the_demo_exists(model: Path):
    for name in demo.SCHEMES:
        demo._recipe(name)


def test_a_folder_that_cannot_be(run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    ran = run("demo", "--out", tmp_path / "file")
    assert ran.status == 1
    assert "cannot be made" in ran.err
