"""bitsandbytes and bitgrain read each other's files: the same weights to the bit, and the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bitgrain
from bitgrain.pipeline.convert import convert
from bitgrain.pipeline.stored import QuantizedCheckpoint

IDS = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def theirs_of(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **settings).eval()


def dense_of(bnb: Any, model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


def divergence(p: Tensor, q: Tensor) -> float:
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("scheme", "layout"),
    [("NF4", "bnb-nf4"), ("FP4_BNB", "bnb-fp4"), ("LLM_INT8", "bnb-int8")],
)
def test_transformers_loads_what_bitgrain_wrote(
    scheme: str, layout: str, bnb: Any, tiny: Callable[[str], Path], tmp_path: Path
):
    out = tmp_path / "out"
    bitgrain.quantize(tiny("llama"), out, scheme, layout=layout, solver="rtn")
    stored, model = QuantizedCheckpoint(out), theirs_of(out)
    dense = dense_of(bnb, model)
    assert dense.keys() == stored.layers.keys()
    for name, theirs in dense.items():
        if layout == "bnb-int8":  # it rounds 1 / 127
            assert torch.allclose(theirs, stored.dense(name), rtol=2.0**-23, atol=0)
        else:
            assert torch.equal(theirs, stored.dense(name))
            assert model.get_submodule(name.removesuffix(".weight")).weight.quant_state.nested
    assert divergence(logits_of(model), logits_of(bitgrain.load(out, execution="dequantize"))) <= 1e-4
    assert divergence(logits_of(model), logits_of(bitgrain.load(out))) <= 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "nf4-double", "fp4-double", "int8"],
)
def test_bitgrain_reads_what_bitsandbytes_wrote(
    settings: dict[str, Any], dtype: torch.dtype, bnb: Any, tiny: Callable[[str], Path], tmp_path: Path
):
    if "load_in_4bit" in settings:
        settings = {**settings, "bnb_4bit_compute_dtype": dtype}
    model = theirs_of(tiny("llama"), dtype=dtype, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(tmp_path / "theirs")
    stored, dense = QuantizedCheckpoint(tmp_path / "theirs"), dense_of(bnb, model)
    assert dense.keys() == stored.layers.keys()
    for name, theirs in dense.items():
        ours = stored.dense(name)
        assert ours.dtype == dtype
        if "load_in_8bit" in settings:
            close = torch.finfo(dtype).eps
            assert torch.allclose(ours.float(), theirs.float(), rtol=close, atol=0)
        else:
            assert torch.equal(ours, theirs)
    ours = bitgrain.load(tmp_path / "theirs", execution="dequantize")
    assert divergence(logits_of(model), logits_of(ours)) <= 1e-3
    name = stored.layout.name
    convert(tmp_path / "theirs", name, tmp_path / "again")
    again = QuantizedCheckpoint(tmp_path / "again")
    for tensor in stored.layers:
        assert torch.equal(again.dense(tensor), stored.dense(tensor))
    convert(tmp_path / "theirs", "bitgrain", tmp_path / "own")
    own = QuantizedCheckpoint(tmp_path / "own")
    assert all(torch.equal(own.dense(tensor), stored.dense(tensor)) for tensor in stored.layers)


def test_the_house_s_double_quantization_becomes_plain_absmax(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "house", "NF4", solver="rtn")
    convert(tmp_path / "house", "bnb-nf4", tmp_path / "out")
    before, after = QuantizedCheckpoint(tmp_path / "house"), QuantizedCheckpoint(tmp_path / "out")
    for name in before.layers:
        assert torch.equal(before.dense(name), after.dense(name))
        assert f"{name}.nested_absmax" not in after.checkpoint.entries
