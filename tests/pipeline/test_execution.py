"""How loaded models compute: packed weights through kernels, the same as the simulation, or an error with a remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.errors import KernelError, SchemeError
from bitgrain.kernels import native
from bitgrain.runtime.quant_linear import quant_layers

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native module was not built")

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "scheme", "packed"),
    [
        *(("llama", scheme, 14) for scheme in ("W4A8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4", "W4AFP8")),
        ("gpt2", "W8A8", 8),
        ("bert", "W4A16_ASYM", 13),
    ],
)
def test_kernels_compute_what_the_simulation_does(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, scheme: str, packed: int
):
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme)
    dense = zoo.outputs(bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"), IDS)
    for execution in ("kernels", "reference"):
        model = bitgrain.load(tmp_path / "out", device="cpu", execution=execution)
        assert len(list(quant_layers(model))) == packed
        assert float((zoo.outputs(model, IDS) - dense).std() / dense.std()) < 0.02


def test_generate(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A8")
    model: Any = bitgrain.load(tmp_path / "out", device="cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 16)


def test_layers_without_a_kernel_are_listed_with_the_remedy(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", "W8A16INT16")
    with pytest.raises(SchemeError, match=r"experts.*inputs in int16.*execution='dequantize'"):
        bitgrain.load(tmp_path / "out", device="cpu")
    with pytest.raises(SchemeError, match="there are: kernels, dequantize, reference"):
        bitgrain.load(tmp_path / "out", execution="fast")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="low_bit"):
        bitgrain.load(tmp_path / "out", execution="kernels", low_bit=True)


def test_without_the_native_module(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A8")
    monkeypatch.setattr(native, "_module", None)
    with pytest.raises(KernelError, match="the native kernels are not here"):
        bitgrain.load(tmp_path / "out", device="cpu")
    zoo.outputs(bitgrain.load(tmp_path / "out", device="cpu", execution="reference"), IDS)
    zoo.outputs(bitgrain.load(tiny("llama"), device="cpu"), IDS)


def test_in_memory():
    dense, packed = zoo.build("llama"), zoo.build("llama")
    bitgrain.quantize_(dense, "W4A8")
    found = bitgrain.quantize_(packed, "W4A8", execution="kernels")
    layers = dict(quant_layers(packed))
    assert {f"{path}.weight" for path in layers} == set(found)
    expected = zoo.outputs(dense, IDS)
    assert float((zoo.outputs(packed.requires_grad_(False), IDS) - expected).std() / expected.std()) < 0.02
    refused = zoo.build("llama")
    before = {name: value.clone() for name, value in refused.state_dict().items()}
    with pytest.raises(SchemeError, match="execution='dequantize'"):
        bitgrain.quantize_(refused, "W8A16INT16", execution="kernels")
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())


def test_weights_alone_with_inputs_in_8_bits(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16")
    model = bitgrain.load(tmp_path / "out", device="cpu", activations="int8")
    assert all(layer.kernel.quantizer is not None for _, layer in quant_layers(model))
    with pytest.raises(SchemeError, match="int4"):
        bitgrain.load(tmp_path / "out", device="cpu", activations="int4")  # type: ignore[arg-type]
