"""What solvers choose in GGUF's types is what its blocks hold, bit for bit."""

import pytest
import torch

from bitgrain.checkpoints.gguf.types import get_type, type_for
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.solvers import Moments, get_solver

BEST = {"name": "gptq", "candidates": ["minmax*0.84", "minmax", "weighted"], "sweeps": 2}


@pytest.mark.parametrize("name", GGUF_TYPES)
@pytest.mark.parametrize("solver", ["rtn", BEST], ids=["rtn", "gptq"])
def test_blocks_hold_what_was_chosen(name: str, solver):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 512, generator=generator) * 0.1, torch.randn(2048, 512, generator=generator)
    weight[2] = 0.0
    weight[3, :256] += 0.3
    q = get_solver(solver).solve(weight, GGUF_TYPES[name], Moments(x.t() @ x / 2048, 2048)).q
    block = get_type(name)
    assert type_for(q.spec) is block
    data = block.pack(q)
    assert data.numel() == q.count_bits() // 8
    assert torch.equal(block.unpack(data, q.shape).dequantize(), q.dequantize())
