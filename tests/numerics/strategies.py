"""Hypothesis strategies for tensors and specs."""

import torch
from hypothesis import strategies as st

from bitgrain.numerics import Granularity, QuantSpec, get_format

FORMATS = ["int2", "int3", "int4", "int8", "uint4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "ternary", "binary"]
GRANULARITIES = [(None, None), (1, None), (None, 1), (1, 3), (1, 4), (2, None), (2, 3), (3, 2)]


@st.composite
def matrices(draw, max_rows=5, max_cols=9):
    """float32 matrices of ordinary weights, with outliers, ties, zeros and whole zero rows."""
    rows, cols = draw(st.integers(1, max_rows)), draw(st.integers(1, max_cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, cols, generator=generator) * 2.0 ** draw(st.integers(-20, 12))
    match draw(st.sampled_from(["plain", "outlier", "ties", "zeros", "positive"])):
        case "outlier":
            x[0, 0] *= 50
        case "ties":
            x = (x / x.abs().max() * 16).round() / 4
        case "zeros":
            x[torch.rand(rows, cols, generator=generator) < 0.5] = 0
            x[-1] = 0
        case "positive":
            x = x.abs()
        case _:
            pass
    return x


@st.composite
def specs(draw, formats=tuple(FORMATS), zero_points=("none", "integer", "real")):
    """Specs with float32 scales and min-max ranges."""
    format = get_format(draw(st.sampled_from(formats)))
    integer = format.name.lstrip("u").startswith("int")
    zero_point = draw(st.sampled_from([z for z in zero_points if integer or z == "none"]))
    signed = integer and not format.name.startswith("u")
    restricted = draw(st.booleans()) if signed and zero_point == "none" else False
    tile = Granularity(*draw(st.sampled_from(GRANULARITIES)))
    return QuantSpec(format, tile, zero_point=zero_point, restricted=restricted)
