"""The twins of `kernels.rows`, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.kernels.rows import Act, Rotary


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    """x [..., width] -> float64. The kernel's distance: width / 16 + 16 roundings of float32, and one to its dtype."""
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def gated(gate: Tensor, up: Tensor | None, act: Act) -> Tensor:
    """float64. The kernel's distance: 2^-20 of |gate up|, and one rounding to its dtype."""
    gate = gate.double()
    match act:
        case "silu":
            y = F.silu(gate)
        case "gelu":
            y = F.gelu(gate)
        case "gelu_tanh":
            y = F.gelu(gate, approximate="tanh")
        case "relu":
            y = F.relu(gate)
        case "relu_squared":
            y = F.relu(gate).square()
    return y if up is None else y * up.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """x [rows, heads, size] -> float64; cos and sin [positions, turned]. The kernel's distance: three roundings."""
    turned = cos.shape[1]
    if rotary == "none":
        return x.double()
    rows = torch.arange(len(x)) % len(cos)
    cos, sin = cos.double()[rows, None], sin.double()[rows, None]
    first, rest = x.double().split([turned, x.shape[-1] - turned], -1)
    if rotary == "half":
        low, high = first.chunk(2, -1)
        other = torch.cat([-high, low], -1)
    else:
        other = torch.stack([-first[..., 1::2], first[..., ::2]], -1).flatten(-2)
    return torch.cat([first * cos + other * sin, rest], -1)
