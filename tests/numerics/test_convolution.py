"""Patches times matrix is the convolution, for every kind that torch has."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitgrain.numerics.convolution import dense_matrix
from bitgrain.runtime.convolutions import geometry_of

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, torch.Tensor]:
    """Any module of torch's convolutions, and an input that it takes."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    settings_: dict[str, Any] = {"kernel_size": sizes(1, 3), "stride": sizes(1, 3), "dilation": sizes(1, 2)}
    settings_ |= {"padding": sizes(0, 2), "groups": groups, "bias": False}
    if transposed:  # a rest of the division by the stride
        steps = zip(settings_["stride"], settings_["dilation"])
        settings_["output_padding"] = tuple(draw(st.integers(0, max(a, b) - 1)) for a, b in steps)
    else:
        settings_["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if (
            settings_["padding_mode"] == "zeros"
            and all(step == 1 for step in settings_["stride"])
            and draw(st.booleans())
        ):
            settings_["padding"] = draw(st.sampled_from(["same", "valid"]))
    torch.manual_seed(draw(st.integers(0, 9)))
    kind = (TRANSPOSED if transposed else PLAIN)[dims]
    module = kind(groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3)), **settings_)
    return module.double(), torch.randn(2, module.in_channels, *sizes(6, 7), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=80)
@given(convolutions())
def test_patches_times_matrix_is_the_convolution(case: tuple[Any, torch.Tensor]):
    module, x = case
    geometry = geometry_of(module)
    matrix = geometry.matrix(module.weight)
    expected = module(x)
    assert matrix.shape == (
        module.out_channels,
        module.weight[0].numel() if not geometry.transposed else matrix.shape[1],
    )
    patches = geometry.patches(x)
    rows = matrix.view(geometry.groups, -1, matrix.shape[1])
    found = torch.einsum("ngkp,gok->ngop", patches, rows).reshape(expected.shape)
    torch.testing.assert_close(found, expected)
    assert torch.equal(geometry.weight(matrix), module.weight)
    whole = torch.einsum("nkp,ok->nop", patches.flatten(1, 2), dense_matrix(matrix, geometry.groups))
    torch.testing.assert_close(whole.reshape(expected.shape), expected)
