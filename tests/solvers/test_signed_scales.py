"""Negative scales, which give the one more code of integers to the positive end, pass through every solver."""

import pytest
import torch

from bitgrain.numerics import QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.ranges import Weighted
from bitgrain.solvers import Moments, get_solver
from bitgrain.solvers.objective import layer_error, row_errors
from bitgrain.solvers.refine import refine


def layer(seed: int = 0) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    return torch.randn(40, 48, generator=generator), Moments(inputs.T @ inputs / 200, 200)


def spec(signs: int) -> QuantSpec:
    return QuantSpec(get_format("int3"), per_group(16), range=Weighted(signs=signs), scale=FP16)


@pytest.mark.parametrize("name", ["rtn", "gptq", "obq", "spqr", "clip", "hqq", "least_squares"])
def test_they_gain_on_average(name):
    losses = [0.0, 0.0]
    for seed in range(3):
        x, moments = layer(seed)
        for signs in (1, 2):
            q = get_solver(name).solve(x, spec(signs), moments).q
            assert bool((q.scale < 0).any()) == (signs == 2)  # type: ignore[operator]
            losses[signs - 1] += layer_error(x, q, moments.hessian)
    assert losses[1] < 0.97 * losses[0]


def test_coordinate_descent_moves_them_too():
    x, moments = layer()
    q = quantize(x, spec(2))
    hessian = moments.hessian + 0.01 * moments.hessian.diagonal().mean() * torch.eye(48)
    found = refine(x, q, hessian)
    negative = q.scale < 0  # type: ignore[operator]
    assert torch.equal(found.scale < 0, negative)  # type: ignore[operator]
    assert bool((found.scale != q.scale)[negative].any())  # type: ignore[index]
    assert bool((row_errors(x, found, hessian) <= row_errors(x, q, hessian)).all())
