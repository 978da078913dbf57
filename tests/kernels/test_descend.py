"""GPTQ's loop over columns: where sums are exact the kernel gives torch's bits, elsewhere its loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import VECTOR_LEVELS, level, threads

from bitgrain.errors import KernelError
from bitgrain.kernels.descend import Descent
from bitgrain.kernels.grid import integer_grid
from bitgrain.kernels.native import torch_only
from bitgrain.numerics import QuantSpec, get_format, per_group
from bitgrain.numerics.spec import int_weight, mxfp4, nf4_double_quantized, nvfp4
from bitgrain.solvers import Moments
from bitgrain.solvers.descend import descend
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.objective import row_errors
from bitgrain.solvers.steps import Lanes, Steps

pytest.importorskip("bitgrain._native", reason="the native module is not built")


def dyadic(*shape: int, seed: int, most: int = 64) -> torch.Tensor:
    """Sixteenths, of which any sum of a few hundred is exact in float32."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)) / 16.0


@st.composite
def cases(draw: st.DrawFn) -> Callable[[], tuple[Any, ...]]:
    """Arguments of `descend` under which every sum is exact; made anew at each call."""
    columns, rows = draw(st.sampled_from([1, 7, 8, 9, 40, 290])), draw(st.sampled_from([1, 15, 16, 48, 49, 100]))
    seed, width = draw(st.integers(0, 2**31)), draw(st.sampled_from([5, 32, 300]))
    format = get_format(draw(st.sampled_from(["int8", "uint8", "fp8_e4m3", "fp8_e5m2"])))
    zero_point = draw(st.sampled_from(["none", "real"] if format.signed else ["integer"]))
    fits, keeps = draw(st.booleans()), draw(st.booleans())

    def make() -> tuple[Any, ...]:
        made = torch.Generator().manual_seed(seed)
        factor = torch.eye(columns) + (torch.rand(columns, columns, generator=made) < 0.03).float().tril_(-1)
        across = -(-columns // width)
        tiles = [i // width for i in range(columns)]
        lanes = Lanes(QuantSpec(format, per_group(width), zero_point), across, rows, factor.device)
        scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (rows, across), generator=made)]
        zero = None if zero_point == "none" else torch.randint(90, 120, (rows, across), generator=made).float()
        lanes.put(Steps(scale, zero), 1, rows)
        x = dyadic(columns, rows, seed=seed)

        def fit_tile(k: int, first: int, last: int) -> None:
            scales = 2.0 ** (x[first:last].sum(0).round() % 3 - 1)  # sees the updated weights
            lanes.put(Steps(scales.unsqueeze(1), None if zero is None else zero[:, k : k + 1]), 1, rows, 0, k)

        kept = torch.rand(columns, rows, generator=made) < 0.1 if keeps else None
        exact = torch.zeros_like(x) if keeps else None
        return x, factor, tiles, lanes, 64, fit_tile if fits else None, kept, exact

    return make


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@settings(deadline=None, max_examples=50)
@given(make=cases())
def test_is_torchs_loop_where_sums_are_exact(isa, make):
    arguments, again = make(), make()
    with level(isa):
        numbers, loss = descend(*arguments)
    with torch_only():
        expected, expected_loss = descend(*again)
    assert torch.equal(numbers, expected)
    assert torch.equal(loss, expected_loss)
    if again[-1] is not None:
        assert torch.equal(arguments[-1], again[-1])


SPECS = {
    "int4": int_weight(4, 32),
    "int3 asymmetric": int_weight(3, 64, asymmetric=True),
    "nvfp4": nvfp4(),
    "mxfp4": mxfp4(),
    "nf4": nf4_double_quantized(),
    "ternary": QuantSpec(get_format("ternary"), per_group(64)),
}


@pytest.mark.parametrize("isa", VECTOR_LEVELS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "settings", [{"order": "act"}, {"order": "group", "candidates": ("minmax*0.9", "minmax")}], ids=str
)
def test_loses_no_more_than_torch(isa, name, settings):
    made = torch.Generator().manual_seed(1)
    weight = torch.randn(60, 200, generator=made)
    x = torch.randn(800, 200, generator=made) @ (torch.eye(200) + torch.randn(200, 200, generator=made) / 7)
    moments = Moments(x.T @ x / 800, 800)
    with level(isa):
        q = GPTQ(**settings).solve(weight, SPECS[name], moments).q
    with torch_only():
        other = GPTQ(**settings).solve(weight, SPECS[name], moments).q
    assert (q.codes != other.codes).float().mean() <= 0.002
    losses = [float(row_errors(weight, one, moments.hessian).sum()) for one in (q, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_no_bit_depends_on_the_number_of_threads():
    made = torch.Generator().manual_seed(2)
    weight, x = torch.randn(300, 320, generator=made), torch.randn(400, 320, generator=made)
    moments = Moments(x.T @ x / 400, 400)
    found = []
    for count in (1, 3):
        factor = torch.linalg.cholesky(moments.hessian + torch.eye(320)).contiguous()
        lanes = Lanes(int_weight(4), 1, 300, factor.device)
        lanes.put(Steps(torch.full((300, 1), 0.3), None), 1, 300)
        with threads(count):
            found.append(descend(weight.T.contiguous(), factor, [0] * 320, lanes, 64))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_misuse():
    grid = integer_grid(-8, 7)
    with pytest.raises(KernelError, match="in one piece on the CPU"):
        Descent(torch.zeros(4, 6).T, torch.eye(6), [0] * 6, grid)
    with pytest.raises(KernelError, match="a tile for each of 4 columns"):
        Descent(torch.zeros(4, 6), torch.eye(4), [0] * 3, grid)
    loop = Descent(torch.zeros(4, 6), torch.eye(4), [0, 0, 1, 1], grid)
    with pytest.raises(KernelError, match="2 or more, 6"):
        loop.set_tables(torch.ones(1, 6), torch.ones(1, 6), None)
