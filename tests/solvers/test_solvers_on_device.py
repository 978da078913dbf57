"""Every solver on the device of the jobs, by torch, against the CPU and its kernels."""

from typing import Any

import pytest
import torch

from bitgrain.kernels.native import torch_only
from bitgrain.pipeline.layers import to_cpu
from bitgrain.recipes import PRESETS
from bitgrain.solvers import Moments, get_solver

SOLVERS: dict[str, Any] = {
    "rtn": "rtn",
    "gptq act": {"name": "gptq", "order": "act"},
    "gptq group": {"name": "gptq", "order": "group", "candidates": ["minmax", "minmax*0.9"], "sweeps": 2},
    "gptq none": {"name": "gptq", "order": "none"},
    "hqq": "hqq",
    "hqq zeros": {"name": "hqq", "scales": False},
    "obq": "obq",
    "spqr": "spqr",
    "clip": "clip",
    "clip grid": {"name": "clip", "mode": "grid"},
}
SCHEMES = ("W3A16_ASYM", "NVFP4A16", "NF4", "GGUF_Q4_K")
CASES = [*((name, "W4A16") for name in SOLVERS), *((name, one) for name in ("gptq group", "hqq") for one in SCHEMES)]


def problem(rows: int = 8, columns: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the moments of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 16
    return torch.randn(rows, columns, generator=generator) * 0.05, x.T @ x / len(x)


def loss(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (weight - dense).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_as_good_as_on_the_cpu(name: str, scheme: str, device: str):
    """Sums in another order move weights that lie between two codes, and all that is rounded after them: what is lost
    in the outputs may grow by a hundredth, or a tenth where one weight's error is fed into the others or limits are
    learned."""
    weight, hessian = problem()
    solver, spec = get_solver(SOLVERS[name]), PRESETS[scheme].weight
    expected = solver.solve(weight, spec, Moments(hessian, 600)).q
    with torch_only():
        solution = solver.solve(weight.to(device), spec, Moments(hessian.to(device), 600))
    assert solution.q.codes.device.type == device
    found = to_cpu(solution.q)
    feeds = name in ("clip", "obq", "spqr") or name.startswith("gptq")
    before, after = (loss(weight, q.dequantize(), hessian) for q in (expected, found))
    assert after <= (1.1 if feeds else 1.01) * before
