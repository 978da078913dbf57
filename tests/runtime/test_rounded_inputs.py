"""Layers whose inputs are rounded to FP8 or FP4: numbers are those of the simulation, what has no kernel is said."""

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bitgrain.kernels.native import is_available
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.spec import mxfp4
from bitgrain.recipes import PRESETS
from bitgrain.recipes.scheme import NVFP4_INPUT_OUTER_SCALE
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.quant_linear import QuantLinear
from bitgrain.solvers import get_solver
from bitgrain.solvers.beside import solve_matrix

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")

E4M3, E5M2 = get_format("fp8_e4m3"), get_format("fp8_e5m2")
MX: dict[str, Any] = {"granularity": per_group(32), "scale": get_format("e8m0")}
SPECS: dict[str, tuple[QuantSpec, QuantSpec]] = {
    name: (PRESETS[name].weight, PRESETS[name].input or INT8_INPUTS)
    for name in ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4", "W4AFP8")
} | {
    "MXFP8": (QuantSpec(E4M3, **MX), QuantSpec(E4M3, **MX, dynamic=True)),
    "MXFP8 e5m2": (QuantSpec(E5M2, **MX), QuantSpec(E5M2, **MX, dynamic=True)),
    "zero points": (
        QuantSpec(get_format("uint4"), per_group(32), zero_point="integer"),
        QuantSpec(E4M3, per_group(32), dynamic=True),
    ),
}


def quantizer_of(spec: QuantSpec, columns: torch.Tensor | None = None) -> InputQuantizer:
    outer = NVFP4_INPUT_OUTER_SCALE if isinstance(spec.scale, QuantSpec) else None
    static = None if spec.dynamic else StaticInput(torch.tensor([[0.004]]))
    return InputQuantizer(spec, outer, static=static, columns=columns)


def layer_of(q: QTensor, quantizer: InputQuantizer, reference: bool = False) -> QuantLinear:
    row = find_linear(q.spec, quantizer.spec, "cpu", reference=reference)
    assert not isinstance(row, str), row
    return QuantLinear(row.kernel(PackedMatrix.of(q), quantizer))


def inputs(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 1, 256)
    x[1], x[2, :128] = 0.0, 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_inputs_are_rounded_as_the_simulation_rounds_them(name: str, dtype: torch.dtype):
    weight, rounded = SPECS[name]
    quantizer, x = quantizer_of(rounded), inputs(dtype)
    eye = replace(weight, format=E4M3, zero_point="none", scale=get_format("float32"))
    q = quantize(torch.eye(256), eye, scale=torch.ones(eye.granularity.tiles((256, 256))))
    assert torch.equal(layer_of(q, quantizer)(x.float()), quantizer(x.float()))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_products_are_those_of_the_simulation(name: str, reference: bool):
    weight, rounded = SPECS[name]
    quantizer, x = quantizer_of(rounded), inputs(torch.float32)
    q = quantize(torch.randn(40, 256, generator=torch.Generator().manual_seed(1)), weight)
    layer = layer_of(q, quantizer, reference)
    torch.testing.assert_close(layer(x), nn.functional.linear(quantizer(x), q.dequantize()), rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.qtensor().codes, q.codes)


def test_copies_and_what_was_saved():
    weight, rounded = SPECS["FP8_BLOCK"]
    q = quantize(torch.randn(40, 256, generator=torch.Generator().manual_seed(1)), weight)
    layer, x = layer_of(q, quantizer_of(rounded)), inputs(torch.bfloat16)
    other = layer_of(quantize(torch.ones(40, 256), weight), quantizer_of(rounded))
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))


def test_columns_apart():
    weight = replace(PRESETS["FP8_DYNAMIC"].weight, columns=PRESETS["LLM_INT8_STATIC"].weight.columns)
    q = solve_matrix(get_solver("rtn"), torch.randn(40, 256), weight, magnitude=torch.arange(256.0)).q
    assert q.columns is not None
    quantizer, x = quantizer_of(SPECS["FP8_DYNAMIC"][1], q.columns.index), inputs(torch.float32)
    torch.testing.assert_close(layer_of(q, quantizer)(x), quantizer(x) @ q.dequantize().T, rtol=1e-5, atol=1e-4)


REFUSED: dict[str, tuple[QuantSpec, QuantSpec, str]] = {
    "groups": (
        PRESETS["FP8_BLOCK"].weight,
        QuantSpec(E4M3, per_group(64), dynamic=True),
        r"per_group\(64\) dynamic beside weights in groups of 128: inputs have a scale for each token, or for each gr",
    ),
    "rows": (PRESETS["FP8_DYNAMIC"].weight, mxfp4(dynamic=True), "beside weights in whole rows"),
    "batch": (PRESETS["FP8"].weight, QuantSpec(E4M3, per_tensor(), dynamic=True), "dynamic inputs fp8_e4m3 per_tensor"),
    "channels": (PRESETS["FP8"].weight, QuantSpec(E4M3, per_channel(1)), "static inputs fp8_e4m3 per_channel"),
    "outliers": (replace(PRESETS["FP8"].weight, outliers=0.01), SPECS["FP8"][1], "outliers and quantized inputs"),
    "integers": (PRESETS["FP8"].weight, INT8_INPUTS, "weights in fp8_e4m3 and quantized inputs"),
    "codebook": (QuantSpec(get_format("dynamic8"), per_channel()), SPECS["FP8"][1], "weights in dynamic8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_said(name: str):
    weight, rounded, why = REFUSED[name]
    found = find_linear(weight, rounded, "cpu")
    assert isinstance(found, str)
    assert re.search(why, found), found
