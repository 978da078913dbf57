"""Conversions between layouts: exact, resumable, or refused with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.demo import demo_model_path
from bitgrain.errors import OutputError, PlanError, SchemeError
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
    with pytest.raises(OutputError, match="exists already"):
        convert(tmp_path / "w8", "bitgrain", tmp_path / "w8")
    assert set(LAYOUTS) >= {"compressed-tensors", "bitgrain"}


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
