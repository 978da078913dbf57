"""What a run shows: products in order, calls of norms, and no trace of the tracing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.models.trace import below, norm_paths, trace


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.inner = nn.ModuleDict({"norm": nn.RMSNorm(4), "plain": nn.LayerNorm(4, elementwise_affine=False)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)))


def test_products_and_norms():
    torch.manual_seed(0)
    block, x = _Block(), torch.randn(3, 4)
    assert norm_paths(block) == ["norm", "inner.norm"]
    assert norm_paths(block, ["inner"]) == ["norm"]
    seen = trace(block, lambda: block(x), ["down.weight", "up.weight"], norm_paths(block))
    assert [key.name for key, _ in seen.products] == ["up.weight", "down.weight"]
    torch.testing.assert_close(seen.input_of("down.weight"), block.up(block.norm(x)))
    assert seen.input_of("inner.norm.weight") is None
    (call,) = seen.norms
    assert (call.path, call.x is x) == ("norm", True)
    assert torch.equal(call.again(), call.y)
    assert torch.equal(seen.output, block(x))
    assert not block.norm._forward_hooks


def test_below():
    assert below("model.layers.1.mlp", ["model.layers.1"])
    assert below("model.layers.1", ["model.layers.1"])
    assert not below("model.layers.10.mlp", ["model.layers.1"])
