"""Training with fake quantizers on convolutions: what is learned is what is left behind."""

import pytest
import torch
from torch import nn

from bitgrain import qat
from bitgrain.recipes import PRESETS, Scheme
from bitgrain.runtime.convolutions import input_quantizer_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 10))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC", "W4A8_CHANNEL"])
def test_learning_and_converting(name: str):
    own = Scheme(name, PRESETS["W4A16_CHANNEL"].weight, PRESETS["W8A8"].input)
    model, x = network(), torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    target = model(x).detach()
    qat.prepare(model, PRESETS.get(name, own), observe=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    losses: list[float] = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if name == "W4A8_CHANNEL":
        assert losses[-1] < 0.7 * losses[0]
    model.eval()
    before = model(x).detach()
    found = qat.convert(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    assert found["2.weight"][0].shape == (8, 36)
    assert set(found.inputs) == (set(found) if name == "W8A8_STATIC" else set())
    for path in (0, 2, 4):
        quantizer = input_quantizer_of(model[path])
        assert quantizer is not None
        assert (quantizer.static is not None) == (name == "W8A8_STATIC")
