"""GPTQModel loads what we write as GPTQ and AWQ, and decodes the same numbers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
from bitgrain.demo import demo_model_path
from bitgrain.pipeline.stored import QuantizedCheckpoint

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="the package gptqmodel is not here"),
]


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
def test_gptqmodel_decodes_the_same_numbers(layout: str, scheme: str, tmp_path: Path):
    from gptqmodel import BACKEND, GPTQModel

    out = tmp_path / "out"
    bitgrain.quantize(demo_model_path(), out, scheme, layout=layout)
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
