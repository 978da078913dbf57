"""Checkpoints whose weights have minima or an order of their columns, loaded and run: packed as dequantized."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bitgrain
from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.kernels.native import is_available
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import Scheme
from bitgrain.runtime.quant_linear import quant_layers
from hand_made import SPECS, hand_made
from zoo import ids_for, save

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source")
    bitgrain.quantize(save("llama", place / "plain"), place / "NF4", "NF4")
    return place / "NF4"


def written(source: Path, folder: Path, name: str) -> Path:
    """The folder `source` with weights made by hand in place of its own."""
    stored, layout = QuantizedCheckpoint(source), BitgrainLayout()
    layers = [replace(one, scheme=Scheme(name, SPECS[name], None)) for one in stored.layers.values()]
    tensors: dict[str, torch.Tensor] = {}
    for tensor in stored.originals():
        if tensor not in stored.layers:
            tensors[tensor] = stored.checkpoint.read(tensor).clone()
    for seed, layer in enumerate(layers):
        tensors |= layout.encode(layer, [hand_made(SPECS[name], *layer.shape, seed=seed, size=0.02)])
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = layout.config(layers, [])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "Q6_K", "act-order"])
def test_packed_as_dequantized(source: Path, tmp_path: Path, name: str):
    folder = written(source, tmp_path / "made", name)
    packed: Any = bitgrain.load(folder, device="cpu")
    dense: Any = bitgrain.load(folder, device="cpu", execution="dequantize")
    assert list(quant_layers(packed))
    ids = ids_for(packed)
    with torch.no_grad():
        found, expected = packed(ids).logits, dense(ids).logits
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()  # inputs of products are rounded to bfloat16
