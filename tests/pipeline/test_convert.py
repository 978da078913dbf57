"""Conversions between layouts: exact, resumable, or refused with the reason."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
from bitgrain.checkpoints.job_folder import JobFolder
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.demo import demo_model_path
from bitgrain.errors import OutputError, PlanError, SchemeError
from bitgrain.pipeline import units
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import make_recipe


@pytest.mark.parametrize("scheme", ["W4A16_CHANNEL", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_there_and_back_gives_the_same_bytes(scheme: str, tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "first", scheme)
    for out, to, source in (("own", "bitgrain", "first"), ("back", "compressed-tensors", "own")):
        convert(tmp_path / source, to, tmp_path / out)
        before, after = QuantizedCheckpoint(tmp_path / source), QuantizedCheckpoint(tmp_path / out)
        assert list(before.layers) == list(after.layers)
        assert all(torch.equal(before.dense(name), after.dense(name)) for name in before.layers)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
    assert all(check.ok is not False for check in bitgrain.verify(tmp_path / "back"))


def test_what_a_layout_cannot_hold_is_refused_before_the_first_byte(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "nf4", "NF4")
    with pytest.raises(PlanError, match="no format for weights nf4"):
        convert(tmp_path / "nf4", "compressed-tensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4"]


def test_an_unknown_layout_and_an_old_folder_are_refused(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "w8", "W8A16")
    with pytest.raises(SchemeError, match="compressed-tensors"):
        convert(tmp_path / "w8", "compressed_tensor", tmp_path / "out")
    with pytest.raises(SchemeError, match=r"known layouts: .*mlx, gguf, onnx-qdq, onnx-nbits"):
        convert(tmp_path / "w8", "exl2", tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "w8", "bitgrain", tmp_path / "w8")
    assert set(LAYOUTS) >= {"compressed-tensors", "bitgrain"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_conversion_goes_on_with_the_same_bytes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the units and the number of threads, and with several files; the manifest's hashes are the files'."""
    bitgrain.quantize(tiny("llama"), tmp_path / "q", "W4A16", layout="gptq-v2")
    convert(tmp_path / "q", "gptq", tmp_path / "whole", max_shard_bytes=50_000)
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    real, count = JobFolder.commit_unit, 0

    def full(self: JobFolder, *args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OutputError("the disk is full")
        real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "commit_unit", full)
        with pytest.raises(OutputError, match="full"):
            convert(tmp_path / "q", "gptq", tmp_path / "out", max_shard_bytes=50_000)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        convert(tmp_path / "q", "gptq", tmp_path / "out", max_shard_bytes=50_000)
    finally:
        torch.set_num_threads(before)
    found = files_of(tmp_path / "out")
    assert found == files_of(tmp_path / "whole")
    told = json.loads(found["manifest.json"])["files"]
    assert told == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(found.items())
        if name != "manifest.json"
    }
    assert len([name for name in told if name.endswith(".safetensors")]) > 1
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_layouts_of_other_engines_are_chosen_converted_and_run(scheme: str, tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "first", scheme, layout="gptq")
    first = QuantizedCheckpoint(tmp_path / "first")
    assert {layer.scheme.weight.scale_format.name for layer in first.layers.values()} == {"bfloat16"}
    assert "lm_head.weight" not in first.layers
    path = tmp_path / "first"
    for to in ("gptq-v2", "awq", "compressed-tensors", "bitgrain", "gptq"):
        path = convert(path, to, tmp_path / to).out
        after = QuantizedCheckpoint(path)
        assert after.layout.name == to
        assert all(torch.equal(first.dense(name), after.dense(name)) for name in first.layers)
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = bitgrain.load(tmp_path / "first", execution="dequantize")(input_ids=ids).logits.float()
        for name in ("first", "gptq-v2", "awq"):
            found = bitgrain.load(tmp_path / name)(input_ids=ids).logits.float()
            assert (found - expected).norm() <= 0.02 * expected.norm()  # the model computes in bfloat16


def test_groups_of_two_sizes_cannot_stand_in_awq(tmp_path: Path):
    mixed = make_recipe(scheme="W4A16", rules=[{"match": "down_proj", "scheme": "W4A16_CHANNEL"}])
    with pytest.raises(PlanError, match="AWQ has one group size for all layers"):
        bitgrain.quantize(demo_model_path(), tmp_path / "out", recipe=mixed, layout="awq")
