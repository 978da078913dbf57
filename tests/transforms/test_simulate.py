"""A block as if quantized: weights and inputs rounded, with scales between them, and the old bits afterwards."""

from __future__ import annotations

import torch
from torch import nn

from bitgrain.numerics import fake_quantize
from bitgrain.recipes import get_scheme
from bitgrain.transforms import Pair
from bitgrain.transforms.simulate import quantized


def test_weights_inputs_and_scales():
    torch.manual_seed(0)
    module = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 4)})
    pair = Pair("linear", "up.weight", ("down.weight",), 16)
    scheme, columns, x = get_scheme("W8A8"), torch.rand(16) + 0.5, torch.randn(5, 16)
    specs = {"down.weight": (scheme.weight, scheme.input)}
    weight = module.down.weight.data.clone()
    plain = module.down(x)
    assert scheme.input is not None
    with quantized(module, pair, ["down.weight"], specs):
        expected = fake_quantize(x, scheme.input) @ fake_quantize(weight, scheme.weight).T + module.down.bias
        torch.testing.assert_close(module.down(x), expected)
    with quantized(module, pair, ["down.weight"], specs, columns):
        rounded = fake_quantize(weight * columns, scheme.weight)
        expected = fake_quantize(x / columns, scheme.input) @ rounded.T + module.down.bias
        torch.testing.assert_close(module.down(x), expected)
    assert torch.equal(module.down.weight, weight)
    assert torch.equal(module.down(x), plain)
