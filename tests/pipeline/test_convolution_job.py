"""Convolutions from disk to disk: codes of a matrix, loaded back in the shape of the original."""

from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import bitgrain
from bitgrain.errors import PlanError
from bitgrain.numerics import QTensor
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import make_recipe

pytestmark = pytest.mark.usefixtures("device")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision") / "resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16_CHANNEL"])
def test_a_resnet_equals_the_one_in_memory(resnet: Path, tmp_path: Path, scheme: str):
    result = bitgrain.quantize(resnet, tmp_path / "out", scheme, include=["Conv2d"])
    assert result.plan.layout.name == "bitgrain"
    assert "conv" not in "".join(note for note in result.plan.notes if note.startswith("kept"))
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written == result.plan.bytes_after
    memory = bitgrain.load(resnet, device="cpu")
    parts: dict[str, list[QTensor]] = bitgrain.quantize_(memory, scheme, include=["Conv2d"])
    assert len(parts) == 7
    stored = QuantizedCheckpoint(tmp_path / "out")
    for layer in stored.layers.values():
        (ours,), (q,) = stored.quantized(layer.tensor), parts[f"{layer.memory_module}.weight"]
        assert torch.equal(ours.codes, q.codes)
        assert stored.dense(layer.tensor).shape == (layer.original or layer.shape)
    loaded = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=X).logits, memory(pixel_values=X).logits)
    assert all(check.ok is not False for check in bitgrain.verify(tmp_path / "out", against=resnet))


def test_the_first_layer_on_disk_is_the_first_of_the_model(resnet: Path):
    rules = [
        {"match": "Conv2d", "include": True},
        {"match": "@first", "scheme": "W8A16"},
        {"match": "@last", "keep": True},
    ]
    plan = bitgrain.plan(resnet, recipe=make_recipe(scheme="W4A16_CHANNEL", rules=rules))
    schemes = {name: layer.scheme.name for name, layer in plan.quantized.items()}
    assert schemes.pop("resnet.embedder.embedder.convolution.weight") == "W8A16"
    assert len(schemes) == 5  # the classifier is kept
    assert set(schemes.values()) == {"W4A16_CHANNEL"}


def test_a_vision_transformer_with_its_patch_embedding(tmp_path: Path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    bitgrain.quantize(tmp_path / "vit", tmp_path / "out", "W8A16", include=["projection"])
    original, loaded = (
        bitgrain.load(tmp_path / "vit", device="cpu"),
        bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"),
    )
    with torch.no_grad():
        a, b = original(pixel_values=X).logits, loaded(pixel_values=X).logits
    assert 0 < (a - b).norm() / a.norm() < 0.03
    bitgrain.quantize(tmp_path / "vit", tmp_path / "plain", "W8A16")  # compressed-tensors, and verify copes
    assert all(check.ok is not False for check in bitgrain.verify(tmp_path / "plain", against=tmp_path / "vit"))


def test_what_cannot_be_done_is_said(resnet: Path):
    with pytest.raises(PlanError, match=r"resnet reads no tokens, so text cannot calibrate it.*bitgrain\.calibrate"):
        bitgrain.plan(resnet, "W8A8_STATIC", include=["Conv2d"])
    plan = bitgrain.plan(resnet, "NVFP4", include=["Conv2d"], on_indivisible="pad")
    assert any("since the convolution sums over it" in problem for problem in plan.problems)
