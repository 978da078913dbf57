"""The dynamic code, beside a slow twin that reads a code bit by bit."""

from itertools import pairwise

import pytest
import torch

from bitgrain.numerics import QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.dynamic_code import dynamic_values


def read(bits: str) -> float:
    """A code without its sign: zeros are powers of ten, the first one ends them, the rest is a fraction of [0.1, 1]."""
    zeros = len(bits) - len(bits.lstrip("0"))
    fraction = bits[zeros + 1 :]
    interval = (1 - 0.1) / 2 ** len(fraction)
    return 10.0**-zeros * (0.1 + interval * (int(fraction or "0", 2) + 0.5))


def test_signed_is_the_paper_s_tree():
    numbers = [read(f"{code:07b}") for code in range(1, 128)]
    expected = sorted([-number for number in numbers] + [0.0] + numbers + [1.0])
    assert dynamic_values(signed=True) == pytest.approx(expected, rel=1e-6)


def test_unsigned_gives_the_sign_to_the_fraction():
    numbers = [read(f"{code:08b}") for code in range(2, 256)]  # the longest run of zeros is as for the signed code
    assert dynamic_values(signed=False) == pytest.approx(sorted([0.0, *numbers, 1.0]), rel=1e-6)


@pytest.mark.parametrize("name", ["dynamic8", "udynamic8"])
def test_it_is_a_format_of_eight_bits(name: str):
    code = get_format(name)
    values = code.grid().tolist()
    assert len(values) == 256
    assert all(a < b for a, b in pairwise(values))
    assert {0.0, 1.0} <= set(values)
    assert (code.bits, code.maximum, code.has_zero, code.code_dtype) == (8, 1.0, True, torch.uint8)
    assert code.signed == (name == "dynamic8")
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(code.to_codes(code.decode(every)), every)


def test_small_numbers_keep_their_size():
    """Five decades below the largest number of a block the relative error is still that of few bits, not all."""
    x = torch.logspace(-5, 0, 256).view(1, -1)
    dynamic = quantize(x, QuantSpec(get_format("udynamic8"), per_group(256))).dequantize()
    linear = quantize(x, QuantSpec(get_format("uint8"), per_group(256))).dequantize()
    assert ((dynamic - x).abs() / x).max() < 0.5
    assert (linear[x < 1e-3] == 0).all()
