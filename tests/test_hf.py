"""from_pretrained of folders of bitgrain's own layout: the models that `bitgrain.load` gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import bitgrain
import bitgrain.hf
from bitgrain.errors import ModelError, SchemeError
from bitgrain.kernels.native import is_available
from bitgrain.runtime.quant_linear import quant_layers
from zoo import ids_for, save

SPQR = """
scheme:
  name: SPQR
  weight: {format: int3, granularity: per_group(16), outliers: 0.01}
"""
needs_kernels = pytest.mark.skipif(not is_available(), reason="the native module was not built")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """A folder for a scheme, made once."""
    place = tmp_path_factory.mktemp("hf")
    source = save("llama", place / "source")
    made: dict[str, Path] = {}

    def folder(scheme: str) -> Path:
        if scheme not in made:
            recipe = None
            if scheme == "SpQR":
                recipe = place / "recipe.yaml"
                recipe.write_text(SPQR)
            bitgrain.quantize(source, place / scheme, None if recipe else scheme, recipe=recipe)
            made[scheme] = place / scheme
        return made[scheme]

    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids_for(model)).logits


@needs_kernels
@pytest.mark.parametrize("scheme", ["W8A16INT16", "SpQR", "NF4", "LLM_INT8"])
def test_the_logits_are_those_of_load(folders: Any, scheme: str):
    folder = folders(scheme)
    model = AutoModelForCausalLM.from_pretrained(folder)
    served = scheme != "W8A16INT16"  # no kernel takes inputs of 16-bit integers
    assert bool(list(quant_layers(model))) == served
    execution = "kernels" if served else "dequantize"
    expected = bitgrain.load(folder, device="cpu", execution=execution)
    assert type(model) is type(expected)
    assert not model.training
    assert logits(model).equal(logits(expected))
    ids = ids_for(model)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).equal(
        expected.generate(ids, max_new_tokens=4, do_sample=False)
    )


@needs_kernels
def test_dequantized_where_the_config_says_so(folders: Any):
    folder = folders("NF4")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["execution"] = "dequantize"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    expected = bitgrain.load(folder, device="cpu", execution="dequantize", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert logits(model).equal(logits(expected))


@needs_kernels
def test_saving(folders: Any, tmp_path: Path):
    packed = AutoModelForCausalLM.from_pretrained(folders("NF4"))
    for name in ("save_pretrained", "push_to_hub"):
        with pytest.raises(SchemeError, match=f"{name} cannot write packed weights"):
            getattr(packed, name)("packed")
    dense = AutoModelForCausalLM.from_pretrained(folders("W8A16INT16"))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(SchemeError, match="execution='dequantize'"):
        packed.dequantize()
    assert not packed.hf_quantizer.is_trainable


@needs_kernels
def test_what_it_refuses(folders: Any, tmp_path: Path):
    folder = folders("NF4")
    with pytest.raises(SchemeError, match="onto one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ModelError, match="LlamaForSequenceClassification cannot be loaded from it"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(SchemeError, match="quantizes nothing"):
        AutoModelForCausalLM.from_pretrained(
            save("llama", tmp_path / "plain"), quantization_config=bitgrain.hf.BitgrainConfig()
        )
    inner = AutoModel.from_pretrained(folder)
    assert type(inner).__name__ == "LlamaModel"
    assert inner(ids_for(inner)).last_hidden_state.isfinite().all()


def test_importing_bitgrain_is_light():
    check = "import sys, bitgrain; sys.exit(1 if 'torch' in sys.modules or 'transformers' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    check = "import transformers, bitgrain, sys; sys.exit(0 if 'bitgrain.hf' in sys.modules else 1)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
