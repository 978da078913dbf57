"""Conversions between layouts: exact, resumable, or refused with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.errors import OutputError, PlanError, SchemeError
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import QuantizedCheckpoint


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
