"""Folders as other programs write them, where they differ from ours: loaded, shown and converted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitgrain
from bitgrain.demo import demo_model_path
from bitgrain.errors import CheckpointError, PlanError
from bitgrain.pipeline.contents import read_contents
from bitgrain.pipeline.stored import QuantizedCheckpoint

AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}


def rewrite(folder: Path, own: dict[str, Any], without: str) -> None:
    """Another `quantization_config`, and no tensors with this ending."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = own
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if not name.endswith(without)}, file)


@pytest.mark.parametrize(
    ("layout", "packing"),
    [("gptq", "auto_round:auto_gptq"), ("gptq-v2", "auto_round"), ("awq", "auto_round:auto_awq")],
)
def test_auto_round_writes_no_order_of_the_inputs(layout: str, packing: str, tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "ours", "W4A16", layout=layout)
    bitgrain.quantize(demo_model_path(), tmp_path / "theirs", "W4A16", layout=layout)
    rewrite(tmp_path / "theirs", AUTO_ROUND | {"packing_format": packing}, without=".g_idx")
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        ours, theirs = (bitgrain.load(tmp_path / name, device="cpu")(input_ids=ids) for name in ("ours", "theirs"))
    assert torch.equal(ours.logits, theirs.logits)
    told = read_contents(tmp_path / "theirs")
    assert told.layout == layout
    assert all(one.nbytes > 0 for one in told.tensors)
    bitgrain.convert(tmp_path / "theirs", "compressed-tensors", tmp_path / "converted")
    before, after = QuantizedCheckpoint(tmp_path / "ours"), QuantizedCheckpoint(tmp_path / "converted")
    assert all(torch.equal(before.dense(name), after.dense(name)) for name in before.layers)


def test_shared_scales_of_nvfp4_inputs_are_those_of_the_file(tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "ours", "NVFP4")
    calibrated = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(calibrated)
    names = [name for name in tensors if name.endswith(".input_global_scale")]
    wanted = {name.removesuffix(".input_global_scale"): 300.0 + i for i, name in enumerate(names)}
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        before = bitgrain.load(tmp_path / "ours", device="cpu", execution="dequantize")(input_ids=ids).logits
    save_file(tensors | {f"{module}.input_global_scale": torch.tensor([v]) for module, v in wanted.items()}, calibrated)
    model = bitgrain.load(tmp_path / "ours", device="cpu", execution="dequantize")
    found = {name: module.input_quantizer.outer_scale for name, module in model.named_modules() if name in wanted}
    assert found == {name: 1 / value for name, value in wanted.items()}
    with torch.inference_mode():
        assert not torch.equal(model(input_ids=ids).logits, before)
    bitgrain.convert(tmp_path / "ours", "compressed-tensors", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: float(again[f"{name}.input_global_scale"]) for name in wanted} == wanted
    with pytest.raises(PlanError, match="NVFP4 inputs with a shared scale of their own, 300"):
        bitgrain.convert(tmp_path / "ours", "bitgrain", tmp_path / "own")


@pytest.mark.parametrize("wrong", [[0.0], [-1.0], [float("nan")], [float("inf")], [1.0, 2.0]])
def test_a_shared_scale_of_nvfp4_inputs_that_is_none(wrong: list[float], tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "out", "NVFP4")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".input_global_scale"))
    save_file(tensors | {name: torch.tensor(wrong)}, file)
    with pytest.raises(CheckpointError, match="input_global_scale"):
        bitgrain.load(tmp_path / "out", device="cpu")


def test_a_packing_that_is_not_read_is_named(tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "out", "W4A16", layout="gptq")
    rewrite(tmp_path / "out", AUTO_ROUND | {"packing_format": "auto_round:fp8_static"}, without=".g_idx")
    with pytest.raises(
        CheckpointError, match=r"quantized with auto-round \(packed as 'auto_round:fp8_static'\); bitgrain"
    ):
        bitgrain.load(tmp_path / "out", device="cpu")
