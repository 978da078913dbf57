"""GPTQModel loads what we write as GPTQ and AWQ, decodes the same numbers, and gives the same logits."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitgrain
from bitgrain.checkpoints.layouts import get_layout
from bitgrain.demo import demo_model_path
from bitgrain.pipeline.readers.compare import Apart
from bitgrain.pipeline.readers.gptqmodel_reader import READER
from bitgrain.pipeline.stored import QuantizedCheckpoint

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # its own, and those of what it loads
    pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="the package gptqmodel is not here"),
]


def same_numbers(out: Path, layout: str) -> None:
    """What its modules decode to is what we read."""
    from gptqmodel import BACKEND, GPTQModel

    stored = QuantizedCheckpoint(out)
    backend = BACKEND.AWQ_TORCH if layout == "awq" else BACKEND.GPTQ_TORCH
    model: Any = GPTQModel.load(str(out), device="cpu", dtype=torch.bfloat16, backend=backend)
    modules = {name: module for name, module in model.model.named_modules() if hasattr(module, "qweight")}
    assert set(modules) == {layer.module for layer in stored.layers.values()}
    for name, module in modules.items():
        module.scales = module.scales.float()
        if layout == "awq":
            from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

            args = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
            theirs = dequantize_gemm(*args)
        else:
            theirs = module.dequantize_weight()
        (ours,) = stored.quantized(f"{name}.weight")
        assert torch.equal(theirs.T.float(), ours.dequantize())


def same_logits(out: Path) -> None:
    ids = torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(0))
    model = bitgrain.load(out, device="cpu", kv_cache="none", execution="dequantize", dtype=torch.float32)
    with torch.inference_mode():
        found = Apart.of(model(input_ids=ids).logits, READER.logits(out, ids))
    print(found)
    assert found.equal()


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("gptq", "W4A16"),
        ("gptq", "W8A16"),
        ("gptq-v2", "W4A16_ASYM"),
        ("gptq-v2", "W3A16_ASYM"),
        ("gptq-v2", "W2A16_ASYM"),
        ("awq", "W4A16"),
        ("awq", "W4A16_ASYM"),
    ],
)
def test_gptqmodel_reads_the_same_model(layout: str, scheme: str, tmp_path: Path):
    bitgrain.quantize(demo_model_path(), tmp_path / "out", scheme, layout=layout)
    same_numbers(tmp_path / "out", layout)
    same_logits(tmp_path / "out")


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_gptqmodel_reads_columns_in_an_order_of_their_own(name: str, tmp_path: Path):
    """Act-order (g_idx): our solvers do not ask for it, files of others that are converted have it."""
    out, layout = tmp_path / "out", get_layout(name)
    bitgrain.quantize(demo_model_path(), out, "W4A16", layout=name)
    stored, draw = QuantizedCheckpoint(out), torch.Generator().manual_seed(5)
    tensors, layers = load_file(out / "model.safetensors"), []
    for tensor, layer in stored.layers.items():
        (q,) = stored.quantized(tensor)
        spec = replace(q.spec, ordered=True)
        order = torch.randperm(q.shape[1], generator=draw).to(torch.int32)
        layers.append(replace(layer, scheme=replace(layer.scheme, weight=spec)))
        tensors |= layout.encode(layers[-1], [replace(q, spec=spec, order=order)])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = layout.config(layers, [("lm_head", "lm_head", "Linear")])
    (out / "config.json").write_text(json.dumps(config))
    assert all(layer.scheme.weight.ordered for layer in QuantizedCheckpoint(out).layers.values())
    same_numbers(out, name)
    same_logits(out)
