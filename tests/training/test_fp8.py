"""FP8 training by simulation: which numbers the products see, and that learning follows full precision."""

import copy

import pytest
import torch
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.training import fp8_training_
from bitgrain.training.fp8 import Fp8Linear


def rounded(x: torch.Tensor, dtype: torch.dtype, scale: float | None = None) -> torch.Tensor:
    """By torch's own float8."""
    largest = torch.finfo(dtype).max
    scale = float(x.abs().max()) / largest if scale is None else scale
    return (x / scale).clamp(-largest, largest).to(dtype).float() * scale


def test_the_three_products_are_those_of_torchs_float8():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    weight, bias = model[0].weight, model[0].bias
    assert fp8_training_(model) == ["0"]
    assert model[0].weight is weight
    x = torch.randn(4, 16, requires_grad=True)
    grad = torch.randn(4, 8)
    y = model(x)
    y.backward(grad)
    x8, w8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(grad, torch.float8_e5m2)
    assert torch.allclose(y, x8 @ w8.T + bias, atol=1e-5)
    assert torch.allclose(x.grad, g8 @ w8, atol=1e-5)
    assert torch.allclose(weight.grad, g8.T @ x8, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum(0), atol=1e-5)


def test_delayed_scales_come_from_the_steps_before():
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    fp8_training_(model, history=2)
    layer = model[0]
    seen = []
    for size in (1.0, 4.0, 2.0, 1.0):
        x = torch.linspace(-size, size, 16).view(1, 16)
        model(x).sum().backward()
        seen.append(layer.input_history.tolist())
    assert seen == [[1.0, 0.0], [4.0, 1.0], [2.0, 4.0], [1.0, 2.0]]
    before = layer.input_history.clone()
    x = torch.linspace(-8, 8, 16).view(1, 16)
    with torch.no_grad():  # a look does not change what the next step does; what is beyond the scale saturates
        y = layer(x)
    assert torch.equal(layer.input_history, before)
    x8 = rounded(x, torch.float8_e4m3fn, 2.0 / 448)
    assert x8.max() == 2.0
    assert torch.allclose(y, x8 @ rounded(layer.weight.detach(), torch.float8_e4m3fn).T, atol=1e-5)
    assert layer.gradient_history[0] == 1.0


@pytest.mark.parametrize("history", [0, 4])
def test_learning_follows_full_precision(history: int):
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    low = copy.deepcopy(exact)
    fp8_training_(low, history=history)
    curves = []
    for model in (exact, low):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(100):
            x = torch.randn(64, 32, generator=generator)
            loss = (model(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1][-1] < 0.5 * curves[1][0]
    assert curves[1][-1] == pytest.approx(curves[0][-1], rel=0.05)
    assert curves[1] != curves[0]


def test_names_and_what_is_kept():
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 4)})
    names = list(model.state_dict())
    assert fp8_training_(model, history=3) == ["body"]
    assert list(model.state_dict()) == names
    assert isinstance(model["body"], Fp8Linear)
    assert "scaling delayed over 3 steps" in repr(model)
    with pytest.raises(SchemeError, match="none is there"):
        fp8_training_(model)
    with pytest.raises(SchemeError, match="not negative"):
        fp8_training_(model, history=-1)


def test_zeros_and_casts():
    model = nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16)
    fp8_training_(model, history=2)
    x = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    (y * 0).sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(x.grad, torch.zeros_like(x))
