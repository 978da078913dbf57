"""Rotations at run time: before the quantizer, once, kept by copies, and only where the checkpoint says."""

import copy

import pytest
import torch
from torch import nn

from bitgrain.errors import CheckpointError
from bitgrain.numerics import QuantSpec, fake_quantize, per_token
from bitgrain.numerics.formats import IntFormat
from bitgrain.numerics.hadamard import Rotation
from bitgrain.runtime.activations import InputQuantizer, quantize_inputs
from bitgrain.runtime.online import attach_rotations, rotate_inputs, stop_rotating

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer_first", [True, False])
def test_the_input_is_rotated_and_then_rounded(quantizer_first: bool):
    layer, rotation = nn.Linear(24, 4), Rotation(24, 7)
    spec = QuantSpec(IntFormat(8), per_token(), restricted=True, dynamic=True)
    steps = [lambda: quantize_inputs(layer, InputQuantizer(spec)), lambda: rotate_inputs(layer, rotation)]
    for step in steps if quantizer_first else reversed(steps):
        step()
    expected = nn.functional.linear(fake_quantize(rotation(X), spec), layer.weight, layer.bias)
    assert torch.equal(layer(X), expected)
    assert torch.equal(copy.deepcopy(layer)(X), expected)


def test_a_rotation_is_replaced_and_undone():
    layer = nn.Linear(24, 4)
    before = layer(X)
    rotate_inputs(layer, Rotation(24, 1))
    rotate_inputs(layer, Rotation(24, 2))
    assert torch.equal(layer(X), nn.functional.linear(Rotation(24, 2)(X), layer.weight, layer.bias))
    stop_rotating(layer)
    assert torch.equal(layer(X), before)
    rotate_inputs(layer, Rotation(24, 2))
    assert torch.equal(layer(X), nn.functional.linear(Rotation(24, 2)(X), layer.weight, layer.bias))


def test_the_dtype_stays():
    layer = nn.Linear(24, 4).to(torch.bfloat16)
    rotate_inputs(layer, Rotation(24, 1))
    assert layer(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("path", "size"), [("1", 24), ("0", 23), ("", 24), ("1.weight", 24)])
def test_a_checkpoint_of_another_model(path: str, size: int):
    model = nn.Sequential(nn.Linear(24, 4), nn.ReLU())
    with pytest.raises(CheckpointError, match="rotates the inputs of"):
        attach_rotations(model, {path: {"size": size, "seed": 0}})
    attach_rotations(model, {"0": {"size": 24, "seed": 0}})
