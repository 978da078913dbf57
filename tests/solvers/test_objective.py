"""The objective of a layer against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.numerics import quantize
from bitgrain.recipes import PRESETS
from bitgrain.solvers import objective
from bitgrain.solvers.objective import layer_error, row_errors
from random_specs import LAWS


@settings(LAWS, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 7, 256]), st.integers(0, 2**31))
def test_is_the_mean_squared_change_of_the_outputs(rows: int, cols: int, piece: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    w, other = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(30, cols, generator=generator, dtype=torch.float64)
    expected = ((x @ (w - other).t()) ** 2).mean(dim=0)
    h = x.t() @ x / 30
    before, objective._PIECE = objective._PIECE, piece
    try:
        assert torch.allclose(row_errors(w, other, h), expected, rtol=1e-10)
        single = row_errors(w.float(), other.float(), h.float())
        assert single.dtype == torch.float64
        assert torch.allclose(single, expected, rtol=1e-4)
        assert layer_error(w, other, h) == pytest.approx(float(expected.sum()))
    finally:
        objective._PIECE = before


def test_quantized_weights_are_measured_as_they_decode(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objective, "_ROWS", 3)
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    q = quantize(w, PRESETS["W4A16"].weight)
    h = torch.eye(128)
    assert layer_error(w, q, h) == layer_error(w, q.dequantize(), h)
    assert layer_error(w, q, h) == pytest.approx(float((w - q.dequantize()).square().sum()), rel=1e-5)
    assert layer_error(w, w, h) == 0
