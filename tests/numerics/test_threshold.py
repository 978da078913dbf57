"""Outlier channels of inputs in full precision: LLM.int8()."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitgrain
import zoo
from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, fake_quantize, per_channel, per_token, quantize
from bitgrain.numerics.formats import IntFormat
from bitgrain.recipes import get_scheme
from bitgrain.recipes.spec_model import SpecModel

PLAIN = QuantSpec(IntFormat(8), per_token(), restricted=True, dynamic=True)
SPEC = replace(PLAIN, threshold=6.0)


def inputs() -> torch.Tensor:
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 40.0
    x[1, 2, 20] = 6.0
    return x


def test_channels_with_an_outlier_anywhere_stay_as_they_are():
    x = inputs()
    found = fake_quantize(x, SPEC)
    apart = [7, 20]
    assert torch.equal(found[..., apart], x[..., apart])
    rest = [channel for channel in range(32) if channel not in apart]
    alone = x.clone()
    alone[..., apart] = 0.0
    assert torch.equal(found[..., rest], fake_quantize(alone, PLAIN)[..., rest])
    assert float((found - x).norm()) < 0.2 * float((fake_quantize(x, PLAIN) - x).norm())


def test_without_outliers_nothing_changes():
    x = inputs().clamp(-3, 3)
    assert torch.equal(fake_quantize(x, SPEC), fake_quantize(x, PLAIN))


def test_gradients_pass_through_both_parts():
    x = inputs().requires_grad_(True)
    fake_quantize(x, SPEC).sum().backward()
    assert x.grad is not None
    assert bool((x.grad[..., [7, 20]] == 1).all())
    assert float(x.grad.mean()) > 0.9  # clipped ones have none


def test_what_has_no_meaning():
    with pytest.raises(SchemeError, match="a threshold of outlier channels is for inputs with dynamic scales"):
        QuantSpec(IntFormat(8), per_channel(), threshold=6.0)
    with pytest.raises(SchemeError, match="dynamic scales"):
        replace(PLAIN, threshold=-1.0)
    with pytest.raises(SchemeError, match="it has no codes"):
        quantize(inputs(), SPEC)


def test_it_is_written_and_read():
    assert SpecModel.of(SPEC).build() == SPEC
    assert "channels from 6 in full precision" in SPEC.describe()
    assert "threshold" not in repr(PLAIN)


def test_a_model_with_outlier_channels(tmp_path: Path):
    """Quantized to disk and loaded: far closer to the original than plain W8A8."""
    model = zoo.stretch(zoo.build("llama"))
    model.save_pretrained(tmp_path / "model")
    ids = zoo.ids_for(model)
    base = zoo.outputs(model, ids)
    errors: dict[str, float] = {}
    for name in ("W8A8", "LLM_INT8"):
        result = bitgrain.quantize(tmp_path / "model", tmp_path / name, name, device="cpu")
        loaded = bitgrain.load(tmp_path / name, device="cpu", dtype=torch.float32)
        errors[name] = float((zoo.outputs(loaded, ids) - base).norm() / base.norm())
        assert result.plan.layout.name == ("bitgrain" if name == "LLM_INT8" else "compressed-tensors")
    assert errors["LLM_INT8"] < 0.5 * errors["W8A8"]
    assert get_scheme("llm-int8").input == SPEC
