"""Layers that run packed weights: what dense weights and simulated inputs give, and what modules must be able to."""

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bitgrain.errors import SchemeError
from bitgrain.kernels.code_linear import rounds_inputs
from bitgrain.kernels.native import is_available
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_block, per_group, per_tensor, quantize
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.low_bit_linear import LowBitLinear
from bitgrain.runtime.operators import operators
from bitgrain.runtime.quant_linear import QuantLinear
from bitgrain.solvers import get_solver
from bitgrain.solvers.beside import solve_matrix

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")

TOKEN = InputQuantizer(INT8_INPUTS)
SPECS = {
    name: PRESETS[name].weight
    for name in ("W8A8", "W4A16", "W4A16_ASYM", "W3A16_ASYM", "W2A16", "INT8_TENSOR", "TERNARY")
} | {
    "uint8": QuantSpec(get_format("uint8"), per_group(32), zero_point="integer"),
    "int5": QuantSpec(get_format("int5"), per_group(32)),
    "real zeros": QuantSpec(get_format("uint4"), per_group(32), zero_point="real"),
    "binary": QuantSpec(get_format("binary"), per_group(64)),
    "blocks": QuantSpec(get_format("int4"), per_block(16, 64)),
}
CODES = SPECS | {name: PRESETS[name].weight for name in ("MXFP4A16", "NVFP4A16", "NF4")}
CODES |= {name: PRESETS[name].weight for name in ("FP8", "FP8_DYNAMIC")}
CODES |= {
    "fp8 blocks": QuantSpec(get_format("fp8_e4m3"), per_block(16, 64)),
    "MXFP8": QuantSpec(get_format("fp8_e4m3"), per_group(32), scale=get_format("e8m0")),
    "e5m2": QuantSpec(get_format("fp8_e5m2"), per_group(64), scale=get_format("bfloat16")),
}
CODES["outliers"] = QuantSpec(get_format("int3"), per_group(32), outliers=0.02)


def weight_of(spec: QuantSpec, rows: int = 40, cols: int = 192) -> QTensor:
    return quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)), spec)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def layer_of(
    q: QTensor, quantizer: InputQuantizer | None, bias: nn.Parameter | None = None, reference: bool = False
) -> QuantLinear:
    row = find_linear(q.spec, None if quantizer is None else quantizer.spec, "cpu", reference=reference)
    assert not isinstance(row, str), row
    return QuantLinear(row.kernel(PackedMatrix.of(q), quantizer), bias)


def bias_of(rows: int = 40) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, rows), requires_grad=False)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_quantized_inputs(name: str, reference: bool):
    q, x = weight_of(SPECS[name]), inputs(2, 5, 192)
    layer = layer_of(q, TOKEN, bias_of(), reference)
    expected = nn.functional.linear(TOKEN(x), q.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", CODES)
def test_weights_alone(name: str, reference: bool):
    q, x = weight_of(CODES[name]), inputs(3, 192)
    layer = layer_of(q, None, bias_of(), reference)
    close: dict[str, Any] = (
        {"rtol": 2e-2, "atol": 0.2} if rounds_inputs(len(x)) and not reference else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(layer(x), nn.functional.linear(x, q.dequantize(), layer.bias), **close)


@pytest.mark.parametrize("quantizer", [None, TOKEN])
@pytest.mark.parametrize("name", CODES)
def test_what_was_stored_comes_back_to_the_bit(name: str, quantizer: InputQuantizer | None):
    q = weight_of(CODES[name])
    if quantizer is not None and name not in SPECS:
        assert isinstance(find_linear(q.spec, quantizer.spec, "cpu"), str)
        return
    layer, low = layer_of(q, quantizer, bias_of()), LowBitLinear(q, bias_of())
    state = layer.state_dict()
    assert state.keys() == low.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in low.state_dict().items())
    other = layer_of(weight_of(CODES[name]), quantizer, nn.Parameter(torch.zeros(40), requires_grad=False))
    other.load_state_dict(state)
    assert torch.equal(other(inputs(3, 192)), layer(inputs(3, 192)))
    assert torch.equal(layer.weight, low.weight)


def test_static_inputs_and_clusters():
    q, x = weight_of(PRESETS["W4A16"].weight), inputs(6, 192)
    spec = QuantSpec(get_format("int8"), per_tensor(), zero_point="integer")
    one = InputQuantizer(spec, static=StaticInput(torch.tensor([[0.02]]), torch.tensor([[-9]], dtype=torch.int8)))
    torch.testing.assert_close(layer_of(q, one)(x), one(x) @ q.dequantize().T, rtol=1e-5, atol=1e-4)
    clusters = StaticInput(
        torch.tensor([[0.01, 0.02, 0.03, 1.0]]),
        torch.tensor([[3, -7, 0, 0]], dtype=torch.int8),
        torch.tensor([50, 90, 52, 0], dtype=torch.int32),
        torch.arange(192, dtype=torch.int16),
    )
    rptq = InputQuantizer(replace(spec, clusters=4), static=clusters)
    layer = layer_of(q, rptq)
    torch.testing.assert_close(layer(x), rptq(x) @ q.dequantize().T, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.qtensor().codes, q.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_and_columns_apart(dtype: torch.dtype):
    x = inputs(4, 192)
    x[1, 7], x[2, 100] = 9.0, -8.0
    x = x.to(dtype)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    threshold = InputQuantizer(PRESETS["LLM_INT8"].input or INT8_INPUTS)
    q = weight_of(PRESETS["LLM_INT8"].weight)
    torch.testing.assert_close(layer_of(q, threshold)(x).float(), threshold(x).float() @ q.dequantize().T, **close)
    assert torch.equal(layer_of(q, threshold)(x[3:]), layer_of(q, TOKEN)(x[3:]))
    solved = solve_matrix(
        get_solver("rtn"), torch.randn(40, 192), PRESETS["LLM_INT8_STATIC"].weight, magnitude=torch.arange(192.0)
    ).q
    assert solved.columns is not None
    kept = InputQuantizer(INT8_INPUTS, columns=solved.columns.index)
    layer = layer_of(solved, kept)
    torch.testing.assert_close(layer(x).float(), kept(x).float() @ solved.dequantize().T, **close)
    assert torch.equal(layer.dequantize(), solved.dequantize())


@pytest.mark.parametrize("quantizer", [None, TOKEN])
def test_copies_and_casts(quantizer: InputQuantizer | None):
    layer, x = layer_of(weight_of(PRESETS["W4A16"].weight), quantizer, bias_of()), inputs(3, 192)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies: list[Any] = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    for other in copies:
        layer_panels, panels = layer.kernel.tensors()["panels"], other.kernel.tensors()["panels"]
        assert torch.equal(other(x), expected)
        assert panels.data_ptr() != layer_panels.data_ptr()
        assert other.panels.data_ptr() == panels.data_ptr()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x), expected, rtol=1e-2, atol=1e-2)  # the bias was rounded
    with pytest.raises(SchemeError, match="run on the CPU, not on meta"):
        copy.deepcopy(layer).to("meta")


def test_no_gradients():
    layer = layer_of(weight_of(PRESETS["W4A16"].weight), TOKEN)
    with pytest.raises(SchemeError, match="low_bit=True"):
        layer(inputs(3, 192).requires_grad_())
    with torch.no_grad():
        assert layer(inputs(3, 192).requires_grad_()).shape == (3, 40)


def test_a_state_that_does_not_fit_is_told():
    layer = layer_of(weight_of(PRESETS["W4A16"].weight), TOKEN)
    state = layer.state_dict()
    state["packed_scale"] = state["packed_scale"][:-1]
    with pytest.raises(RuntimeError, match="packed_scale"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="packed_codes"):
        layer.load_state_dict({})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str):
    first, second = (layer_of(weight_of(PRESETS[name].weight, 192), TOKEN) for name in ("W4A8", "W8A8"))
    model = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(compiled(inputs(3, 192)), model(inputs(3, 192)))
    torch.compiler.reset()


def test_what_no_kernel_serves():
    assert find_linear(PRESETS["W8A16"].weight, PRESETS["W8A16INT16"].input, "cpu") == "inputs in int16"
    assert find_linear(QuantSpec(get_format("dynamic8"), per_group(64)), None, "cpu") == "weights in dynamic8"
    assert find_linear(PRESETS["W4A8"].weight, INT8_INPUTS, "cuda") == "no kernels for cuda yet"
    rows = [row for row in operators() if row.operation == "linear"]
    assert {row.device for row in rows if not row.reference} == {"cpu"}
