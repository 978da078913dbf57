"""A dense layer that multiplies few rows natively: the numbers of torch, and torch where it may not."""

import copy
import pickle

import torch
from torch import nn

from bitgrain.kernels.dense_rows import MOST_ROWS
from bitgrain.runtime.dense_head import FewRows, multiply_few_rows_natively


def test_is_the_layer():
    layer = nn.Linear(40, 24)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    expected = layer(x).detach()
    multiply_few_rows_natively(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        many = torch.randn(MOST_ROWS + 1, 40)
        assert layer(many).equal(nn.functional.linear(many, layer.weight, layer.bias))
    layer(x).sum().backward()  # gradients go torch's way
    assert layer.weight.grad is not None
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again.weight.data.mul_(2)
        with torch.no_grad():
            torch.testing.assert_close(again(x), 2 * (expected - layer.bias) + layer.bias)


def test_other_layers_stay():
    layer = nn.Bilinear(3, 3, 3)
    multiply_few_rows_natively(layer)
    multiply_few_rows_natively(None)
    assert not isinstance(layer.forward, FewRows)
