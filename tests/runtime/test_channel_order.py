"""Norms that write their channels in another order."""

import copy

import pytest
import torch
from torch import nn

from bitgrain.errors import CheckpointError
from bitgrain.runtime.channel_order import attach_orders, reorder_outputs, stop_reordering

ORDER = torch.tensor([2, 0, 3, 1])


def test_the_norm_writes_in_the_order_until_it_is_stopped():
    norm, x = nn.LayerNorm(4), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain = norm(x)
    reorder_outputs(norm, ORDER)
    assert torch.equal(norm(x), plain[..., ORDER])
    assert torch.equal(copy.deepcopy(norm)(x), plain[..., ORDER])
    reorder_outputs(norm, ORDER.argsort())
    assert torch.equal(norm(x), plain[..., ORDER.argsort()])
    stop_reordering(norm)
    assert torch.equal(norm(x), plain)


def test_orders_as_they_are_stored():
    model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), torch.ones(1, 4).cumsum(-1)
    expected = model[1](model[0](x)[..., ORDER])
    attach_orders(model, {"0": ORDER.to(torch.int16)})
    assert torch.equal(model(x), expected)


def test_a_checkpoint_of_another_model_or_a_damaged_one():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(CheckpointError, match="reorders the output of 7, which this model does not have"):
        attach_orders(model, {"7": ORDER})
    with pytest.raises(CheckpointError, match="order of the channels that 0 writes is damaged"):
        attach_orders(model, {"0": torch.tensor([0, 1, 1, 2])})
