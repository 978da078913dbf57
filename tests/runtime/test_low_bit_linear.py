"""Layers with packed weights: the same bits as dense ones, forward and backward."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, per_token, quantize
from bitgrain.numerics.hadamard import Rotation
from bitgrain.numerics.spec import nf4_double_quantized
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer, quantize_inputs
from bitgrain.runtime.low_bit_linear import LowBitLinear, held_nbytes, hold_low_bit_, low_bit_layers
from bitgrain.runtime.online import rotate_inputs
from bitgrain.solvers import get_solver
from bitgrain.solvers.beside import solve_matrix

SPECS = {name: scheme.weight for name, scheme in PRESETS.items()}
KEPT = SPECS.pop("LLM_INT8_STATIC")
SPECS |= {
    "outliers": QuantSpec(get_format("int3"), per_group(32), outliers=0.02),
    "int16": QuantSpec(get_format("int16"), per_group(32)),
    "real zero": QuantSpec(get_format("uint4"), per_group(32), zero_point="real"),
}


def weight_of(spec: QuantSpec, rows: int = 24, cols: int = 256) -> QTensor:
    return quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)), spec)


def test_columns_in_16_bits_stay_beside_packed_codes():
    assert KEPT.columns is not None
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    solved = solve_matrix(get_solver("rtn"), weight, KEPT, magnitude=torch.arange(256.0))
    layer, x = LowBitLinear(solved.q), batch(3, 256)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, solved.q.dequantize()), rtol=0, atol=0)
    assert torch.equal(layer.dequantize()[:, -6:], weight[:, -6:].half().float())


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).requires_grad_(True)


@pytest.mark.parametrize("name", SPECS)
def test_forward_and_gradients_are_those_of_the_dense_weight(name: str):
    q, bias = weight_of(SPECS[name]), nn.Parameter(torch.linspace(-1, 1, 24))
    layer = LowBitLinear(q, bias)
    x, twin, twin_bias = batch(2, 5, 256), batch(2, 5, 256), bias.detach().clone().requires_grad_(True)
    expected = nn.functional.linear(twin, q.dequantize(), twin_bias)
    assert torch.equal(layer(x), expected)
    expected.square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert torch.allclose(bias.grad, twin_bias.grad, rtol=1e-6)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_nothing_dense_is_held_or_saved_for_the_backward_pass():
    layer, saved = LowBitLinear(weight_of(nf4_double_quantized(), 256, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(batch(2, 256))
    assert saved == []
    y.sum().backward()
    assert held_nbytes(layer) == layer.packed_nbytes == 256 * 256 // 2 + 256 * 4 + 256 * (4 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_change_the_products_and_not_the_codes(dtype: torch.dtype):
    q = weight_of(PRESETS["W4A16_ASYM"].for_dtype(torch.float16).weight)
    layer = LowBitLinear(q).to(dtype)
    x = batch(3, 256).to(dtype).detach().requires_grad_(True)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, q.dequantize(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(layer.float().dequantize(), q.dequantize())


def test_a_weight_is_rounded_to_the_dtype_it_had():
    q = weight_of(SPECS["NF4"])
    layer = LowBitLinear(q, dtype=torch.float32, stored=torch.bfloat16)
    assert torch.equal(layer.dequantize(), q.dequantize(torch.bfloat16).float())


def test_autocast():
    layer = LowBitLinear(weight_of(SPECS["NF4"]))
    x = batch(3, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


def test_state_dict_and_copies():
    q = weight_of(SPECS["NF4"])
    layer, other = LowBitLinear(q), LowBitLinear(weight_of(SPECS["NF4"]))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), q.dequantize())
    assert torch.equal(copy.deepcopy(layer)(batch(2, 256)), layer(batch(2, 256)))
    assert "nf4" in repr(layer)


def test_writing_to_the_weight_is_refused():
    layer = LowBitLinear(weight_of(SPECS["NF4"]))
    assert torch.equal(layer.weight, layer.dequantize())
    assert type(layer.weight + 1) is torch.Tensor
    with pytest.raises(SchemeError, match="kept in low bits"):
        layer.weight.data += 1


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layers_are_replaced_and_made_dense_again(kind: str):
    dense = nn.Linear(256, 24) if kind == "linear" else Conv1D(24, 256)
    model = nn.Sequential(dense, nn.Tanh())
    weight = dense.weight.data if kind == "linear" else dense.weight.data.T.contiguous()
    q = quantize(weight, SPECS["NF4"])
    assert hold_low_bit_(model, {"0": q, "1": q}) == ["0"]
    assert [path for path, _ in low_bit_layers(model)] == ["0"]
    back = model[0].to_dense()
    assert type(back) is type(dense)
    assert back.weight.shape == dense.weight.shape
    x = batch(4, 256)
    assert torch.allclose(back(x), model[0](x), atol=1e-5)


def test_input_quantizers_and_rotations_go_over():
    model = nn.Sequential(nn.Linear(256, 24))
    rotation = Rotation(256, 3)
    quantize_inputs(model[0], InputQuantizer(QuantSpec(get_format("int8"), per_token(), restricted=True, dynamic=True)))
    rotate_inputs(model[0], rotation)
    q = quantize(model[0].weight.data, SPECS["W8A8"])
    model[0].weight.data = q.dequantize()
    x = batch(4, 256)
    expected = model(x)
    hold_low_bit_(model, {"0": q})
    assert torch.equal(model(x), expected)
    exact = nn.functional.linear(rotation(x), q.dequantize(), model[0].bias)
    assert torch.allclose(model[0].to_dense()(x), exact, atol=1e-4)


def test_shared_weights_stay_dense():
    model = nn.ModuleDict({"embed": nn.Embedding(24, 256), "head": nn.Linear(256, 24, bias=False)})
    model["head"].weight = model["embed"].weight
    assert hold_low_bit_(model, {"head": quantize(model["head"].weight.data, SPECS["NF4"])}) == []
    assert type(model["head"]) is nn.Linear
