"""Scales about their mean: the error is bounded by the code's widest gap, and the sum comes after the product."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitgrain.numerics import QTensor, QuantSpec, get_format, quantize
from bitgrain.numerics.about_mean import about, quantize_about_mean
from bitgrain.numerics.spec import bnb_4bit
from bitgrain.solvers import get_solver
from random_specs import LAWS

SPEC = bnb_4bit("nf4").scale


@LAWS
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_the_error_is_at_most_half_the_widest_gap_of_the_run(rows: int, cols: int, seed: int):
    assert isinstance(SPEC, QuantSpec)
    x = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    q = quantize_about_mean(x, SPEC)
    assert isinstance(q.scale, Tensor)
    assert isinstance(q.minimum, Tensor)
    assert torch.equal(q.minimum, torch.full_like(q.minimum, float(-x.mean())))
    flat, values = x.flatten(), get_format("dynamic8").grid()
    widest = float(values.diff().max())
    for i, run in enumerate(flat.split(256)):
        largest = (run - x.mean()).abs().max()
        error = (q.dequantize().flatten()[256 * i : 256 * i + 256] - run).abs().max()
        assert error <= largest * widest / 2 + 1e-6
        expected = values[q.codes.flatten()[256 * i : 256 * i + 256].long()] * q.scale[0, i] - q.minimum[0, i]
        assert torch.equal(q.dequantize().flatten()[256 * i : 256 * i + 256], expected)
    assert torch.equal(about(q.dequantize(), SPEC, q.scale, q.minimum).codes, q.codes)


def test_solvers_keep_the_scales_that_their_codes_were_chosen_for():
    weight = torch.randn(40, 640, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, bnb_4bit("nf4"))
    q = get_solver("rtn").solve(weight, bnb_4bit("nf4")).q
    assert isinstance(q.scale, QTensor)
    assert torch.equal(q.dequantize(), whole.dequantize())
    again = quantize(weight, q.spec, scale=q.scale)
    assert torch.equal(again.codes, q.codes)
