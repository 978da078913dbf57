"""Files of other programs, measured: the losses, and a table that hides no failure."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitgrain
from bitgrain.demo import demo_model_path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from peer_files import report  # noqa: E402
from peers.answer import losses  # noqa: E402


def test_losses_are_those_of_torch():
    made = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(3, 7, 11, generator=made) * 20, torch.randint(0, 11, (3, 7), generator=made)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none")
    assert np.allclose(losses(logits.numpy(), ids.numpy()), expected.numpy(), rtol=1e-12)


def test_our_side_measures_a_file(tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "out", "W4A16", layout="gptq")
    ids = np.arange(40).reshape(2, 20)
    np.save(tmp_path / "ids.npy", ids)
    request = {"path": tmp_path / "out", "ids": tmp_path / "ids.npy"}
    request |= {"answer": tmp_path / "answer.json", "losses": tmp_path / "losses.npy"}
    (tmp_path / "request.json").write_text(json.dumps(request, default=str))
    script = ROOT / "benchmarks" / "peers" / "read_bitgrain.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "request.json")], check=True, capture_output=True)
    told = json.loads((tmp_path / "answer.json").read_text())
    assert (told["layout"], told["weights"]) == ("gptq", ["int4 per_group(128), scale bfloat16"])
    model: Any = bitgrain.load(tmp_path / "out", device="cpu", dtype=torch.float32, execution="dequantize")
    with torch.inference_mode():
        expected = losses(model(input_ids=torch.from_numpy(ids)).logits.numpy(), ids)
    assert np.allclose(np.load(tmp_path / "losses.npy"), expected)


ROW: dict[str, Any] = {"peer": "mlx", "what": "4 bits", "versions": {"mlx-lm": "1.0"}, "within": 1e-4}
READ = {"layout": "mlx", "layers": 4, "theirs": 9.0, "ours": 9.5, "ratio": 1.0556, "apart": 0.2}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (READ | {"equal": False}, "NOT EQUAL"),
        (READ | {"equal": True, "ours": 9.0, "ratio": 1.0}, "| equal |"),
        ({"theirs": 9.0, "ours": None, "failure": "not read by bitgrain: a | b"}, "not read by bitgrain: a / b"),
        ({"failure": "not made: no compiler"}, "not made: no compiler"),
    ],
)
def test_the_table_tells_what_went_wrong(row: dict[str, Any], words: str):
    text = report([ROW | row], ["GPTQModel, whose Python was not given"], "told")
    assert words in text
    assert "Left out: GPTQModel" in text
    assert text.splitlines()[-1].count("|") == 11
