"""Inputs of convolutions on their grid, and the scales that they may have."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, fake_quantize, per_group, per_tensor, per_token
from bitgrain.numerics.granularity import Granularity
from bitgrain.numerics.observers import StaticInput, static_channels
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.attention.contraction import axes_table
from bitgrain.runtime.convolutions import CONTRACTION, ConvolutionInput, quantize_layer_inputs

INT8 = QuantSpec(IntFormat(8), per_tensor(), restricted=True)
X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 20]).view(3, 1, 1, 1)


def test_one_scale_for_each_sample():
    dynamic = replace(INT8, granularity=per_token(), dynamic=True)
    found = ConvolutionInput(InputQuantizer(dynamic), 2)(X)
    for image, one in zip(X, found, strict=True):
        step = image.abs().max() / 127
        torch.testing.assert_close(one, (image / step).round() * step)
    assert torch.equal(ConvolutionInput(InputQuantizer(dynamic), 2)(X[1]), found[1])  # without samples


def test_one_static_scale():
    quantizer = InputQuantizer(INT8, static=StaticInput(torch.tensor([[0.05]])))
    found = ConvolutionInput(quantizer, 2)(X)
    torch.testing.assert_close(found, (X / 0.05).round().clamp(-128, 127) * 0.05)


def test_a_static_scale_for_each_channel():
    spec = QuantSpec(IntFormat(8), Granularity(None, 1), "integer")
    low, high = X.amin((0, 2, 3)), X.amax((0, 2, 3))
    found = ConvolutionInput(InputQuantizer(spec, static=static_channels(low, high, spec)), 2)(X)
    for c in range(4):
        alone = fake_quantize(X[:, c], QuantSpec(IntFormat(8), per_tensor(), "integer"))
        torch.testing.assert_close(found[:, c], alone)
    steps = (high.clamp(min=0) - low.clamp(max=0)) / 255
    assert ((found - X).abs().amax((0, 2, 3)) <= steps * 0.501).all()


def test_the_convolution_sees_rounded_inputs():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 2, 3, padding=1)
    expected = module((X / 0.1).round().clamp(-128, 127) * 0.1)
    quantize_layer_inputs(module, InputQuantizer(INT8, static=StaticInput(torch.tensor([[0.1]]))))
    torch.testing.assert_close(module(X), expected)


def test_scales_that_cannot_be():
    assert CONTRACTION.allowed(0) == "b"
    assert CONTRACTION.allowed(1) == "o"
    for spec in (
        replace(INT8, granularity=per_group(2), dynamic=True),
        replace(INT8, granularity=Granularity(None, 1), dynamic=True),
    ):
        with pytest.raises(
            SchemeError, match=r"cannot vary by input channel, since the convolution sums over it.*batch"
        ):
            ConvolutionInput(InputQuantizer(spec), 2)
    with pytest.raises(SchemeError, match="outlier channels"):
        ConvolutionInput(InputQuantizer(replace(INT8, granularity=per_token(), dynamic=True, threshold=6.0)), 2)


def test_the_table_in_the_docs():
    page = Path(__file__).parents[2] / "docs" / "convolutions.md"
    assert axes_table({"input": (CONTRACTION, 0), "weight": (CONTRACTION, 1)}) in page.read_text()
