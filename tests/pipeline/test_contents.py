"""What `show` tells of a checkpoint is what lies in its files."""

from collections.abc import Callable
from pathlib import Path

import pytest

import bitgrain
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.errors import CheckpointError
from bitgrain.pipeline.contents import read_contents
from zoo import edit_config, edited


@pytest.mark.parametrize(("scheme", "layout"), [("W4A16", "compressed-tensors"), ("W8A16INT16", "bitgrain")])
def test_bytes_add_up_to_those_of_the_files(scheme: str, layout: str, tiny: Callable[[str], Path], tmp_path: Path):
    plan = bitgrain.quantize(tiny("mixtral"), tmp_path / "out", scheme).plan
    found = read_contents(tmp_path / "out")
    assert found.layout == layout
    assert found.nbytes == sum(entry.nbytes for entry in open_checkpoint(tmp_path / "out").entries.values())
    assert {tensor.name for tensor in found.tensors if tensor.quantized} == set(plan.quantized)
    assert found.bits_per_weight == pytest.approx(plan.bits_per_weight)
    words = {tensor.weight for tensor in found.tensors if tensor.quantized}
    assert words == {layer.scheme.weight.describe() for layer in plan.quantized.values()}


def test_a_checkpoint_that_is_not_quantized_is_shown_as_it_is(tiny: Callable[[str], Path]):
    found = read_contents(tiny("llama"))
    assert (found.layout, found.bits_per_weight, found.bits_per_parameter) == ("none", None, 32)


def test_an_unknown_way_of_quantizing_is_named(tiny: Callable[[str], Path], tmp_path: Path):
    folder = edited(tiny("llama"), tmp_path / "other")
    edit_config(folder, quantization_config={"quant_method": "eetq"})
    with pytest.raises(CheckpointError, match="is quantized with eetq; bitgrain reads"):
        read_contents(folder)
