"""The static scale that is best for the layer's output."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.calibration.static_inputs import FRACTIONS, search_input
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_channel, per_tensor
from bitgrain.recipes import PRESETS

INT8, FP8 = PRESETS["W8A8_STATIC"].input, PRESETS["FP8"].input
ASYMMETRIC = QuantSpec(get_format("int8"), per_tensor(), zero_point="integer")
assert INT8 is not None
assert FP8 is not None


def case(seed: int, outs: tuple[int, ...] = (6,)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, generator=generator) + 0.3
    x[seed % 40, seed % 8] *= 60
    return x, [torch.randn(out, 8, generator=generator) for out in outs]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([(6,), (3, 2), (9, 7)]))
def test_no_candidate_is_better(seed: int, outs: tuple[int, ...]):
    """Each candidate by hand: int8 codes from -128 to 127, outputs of every weight in float64, token by token."""
    x, weights = case(seed, outs)
    found, error = search_input(x, weights, INT8)
    outputs = [sum(float((w.double() @ row.double()).square().sum()) for w in weights) for row in x]
    counts = [1 / (output + sum(outputs) / len(outputs)) for output in outputs]
    errors = {}
    for fraction in FRACTIONS:
        scale = torch.tensor(float(x.abs().max()) * fraction) / 127
        change = (x / scale).round().clamp(-128, 127) * scale - x
        changed = [sum(float((w.double() @ row.double()).square().sum()) for w in weights) for row in change]
        errors[fraction] = sum(count * one for count, one in zip(counts, changed, strict=True))
    whole = sum(count * output for count, output in zip(counts, outputs, strict=True))
    assert error == pytest.approx(min(errors.values()) / whole, rel=1e-4)
    chosen = float(found.scale) * 127 / float(x.abs().max())
    nearest = min(errors, key=lambda fraction: abs(fraction - chosen))
    assert math.isclose(nearest, chosen, rel_tol=1e-5)
    assert errors[nearest] == pytest.approx(min(errors.values()), rel=1e-4)


def test_an_outlier_is_clipped_only_where_its_column_is_small():
    x, _ = case(0)
    x[0] = 0.0
    x[0, 0] = 500.0
    weight = torch.eye(8)
    kept, _ = search_input(x, [weight], INT8)
    weight[0, 0] = 1e-4
    clipped, _ = search_input(x, [weight], INT8)
    assert float(kept.scale) == pytest.approx(500 / 127)
    assert float(clipped.scale) < 0.2 * float(kept.scale)


@pytest.mark.parametrize("spec", [INT8, FP8, ASYMMETRIC], ids=["int8", "fp8", "asymmetric"])
def test_every_static_spec(spec: QuantSpec):
    x, weights = case(3)
    found, error = search_input(x, weights, spec)
    assert 0 < error < 0.02
    assert (found.zero is None) == spec.symmetric
    _, fixed = search_input(x, weights, spec, fractions=(1.0,))
    assert error <= fixed
    wide, _ = search_input(x, weights, spec, low=-1e4, high=1e4, fractions=(1.0,))
    assert float(wide.scale) > 20 * float(found.scale)


def test_edges():
    zeros, error = search_input(torch.zeros(3, 8), [torch.ones(2, 8)], INT8)
    assert (float(zeros.scale), error) == (1.0, 0.0)
    with pytest.raises(SchemeError, match="up: there are no inputs"):
        search_input(torch.zeros(0, 8), [torch.ones(2, 8)], INT8, name="up")
    with pytest.raises(NumericsError, match="up holds 1 NaN"):
        search_input(torch.tensor([[math.nan]]), [torch.ones(1, 1)], INT8, name="up")
    with pytest.raises(SchemeError, match="have no static scale"):
        search_input(torch.ones(1, 1), [torch.ones(1, 1)], QuantSpec(get_format("int8"), per_channel()))
