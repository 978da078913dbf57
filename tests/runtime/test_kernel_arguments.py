"""Weights with minima, nested signed scales and orders of their columns, through kernels: what dense weights give."""

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitgrain.kernels.code_linear import rounds_inputs
from bitgrain.kernels.native import is_available
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, per_tensor
from bitgrain.numerics.formats import E8M0, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.embedding_rows import find_embedding
from bitgrain.runtime.kernel_arguments import refuse_shared
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.low_bit_linear import LowBitLinear
from bitgrain.runtime.packed_kernels import PackedKernel
from bitgrain.runtime.quant_experts import QuantExperts
from bitgrain.runtime.quant_linear import QuantLinear
from hand_made import SPECS, hand_made, with_minima

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")

TOKEN = InputQuantizer(INT8_INPUTS)
STATIC = InputQuantizer(
    QuantSpec(get_format("int8"), per_tensor(), zero_point="integer"),
    static=StaticInput(torch.tensor([[0.03]]), torch.tensor([[-9]], dtype=torch.int8)),
)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def kernel_of(q: QTensor, quantizer: InputQuantizer | None = None, reference: bool = False) -> PackedKernel:
    row = find_linear(q.spec, None if quantizer is None else quantizer.spec, "cpu", reference=reference)
    assert not isinstance(row, str), row
    return row.kernel(PackedMatrix.of(q), quantizer)


def bound(q: QTensor, x: torch.Tensor) -> torch.Tensor:
    """1e-6 of the largest that sums could be: of the codes' parts and of the minima by themselves."""
    scale = replace(q, codes=torch.full_like(q.codes, int(q.spec.format.maximum))).dequantize().abs()
    base = replace(q, codes=torch.zeros_like(q.codes)).dequantize().abs()
    return 1e-6 * (x.abs().double() @ (scale + 2 * base).double().T)


@pytest.mark.parametrize("quantizer", [None, TOKEN, STATIC], ids=["16 bits", "int8 per token", "int8 static"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_products(name: str, reference: bool, quantizer: InputQuantizer | None):
    q = hand_made(SPECS[name], 40, 512)
    bias = nn.Parameter(torch.linspace(-1, 1, 40), requires_grad=False)
    layer = QuantLinear(kernel_of(q, quantizer, reference), bias)
    for rows in (1, 5, 60):
        x = inputs(rows, 512)
        seen = x if quantizer is None else quantizer(x)
        if quantizer is None and rounds_inputs(rows) and not reference:
            seen = x.bfloat16().float()  # tables of integers are exact
        expected = seen.double() @ q.dequantize().double().T + bias.double()
        assert ((layer(x).double() - expected).abs() <= bound(q, seen) + 1e-6).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([16, 32, 7, 300]),
    storage=st.sampled_from([FP32, get_format("float16"), get_format("bfloat16"), SPECS["Q4_K"].scale, E8M0]),
    least=st.sampled_from([FP32, get_format("float16"), get_format("fp8_e4m3"), SPECS["Q2_K"].scale]),
    ordered=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_storage_of_scales_and_minima(bits, group, storage, least, ordered, whole, seed):
    spec = replace(with_minima(bits, group), scale=FP32 if storage == E8M0 else storage, minimum=least, ordered=ordered)
    q = hand_made(spec, 33, 150, seed)
    if storage == E8M0:
        powers = torch.full(q.scale.shape, 2.0**-3).to(torch.float8_e8m0fnu)
        q = replace(q, spec=replace(spec, scale=E8M0), scale=powers)
    kernel, x = kernel_of(q, TOKEN if whole else None), inputs(3, 150)
    seen = TOKEN(x) if whole else x.bfloat16().float() if rounds_inputs(len(x)) else x
    expected = seen.double() @ q.dequantize().double().T
    assert ((kernel.call(x).double() - expected).abs() <= bound(q, seen) + 1e-6).all()
    assert kernel.qtensor().dequantize().equal(q.dequantize())


def test_a_scale_of_nothing_leaves_the_minimum():
    q = hand_made(SPECS["Q4_1"], 32, 64)
    q = replace(q, scale=torch.zeros_like(q.scale))
    x = torch.ones(1, 64)
    assert kernel_of(q).call(x).allclose(q.dequantize().sum(1), rtol=1e-6)
    assert (q.dequantize() != 0).any()


@pytest.mark.parametrize("quantizer", [None, TOKEN], ids=["16 bits", "int8 per token"])
@pytest.mark.parametrize("name", SPECS)
def test_what_was_stored_comes_back_to_the_bit(name: str, quantizer: InputQuantizer | None):
    q, x = hand_made(SPECS[name], 40, 512), inputs(3, 512)
    layer, low = QuantLinear(kernel_of(q, quantizer)), LowBitLinear(q)
    state = layer.state_dict()
    assert state.keys() == low.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in low.state_dict().items())
    assert torch.equal(layer.weight, low.weight)
    other = QuantLinear(kernel_of(hand_made(SPECS[name], 40, 512, seed=9), quantizer))
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies: list[Any] = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    for one in copies:
        assert torch.equal(one(x), layer(x))
        assert one.qtensor().dequantize().equal(q.dequantize())


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.ordered])
def test_rows_of_embeddings_and_tied_heads(name: str):
    q, ids = hand_made(SPECS[name], 40, 512), torch.tensor([[3, 0], [39, 7]])
    for reference in (False, True):
        row = find_embedding(q.spec, "cpu", reference=reference)
        assert not isinstance(row, str), row
        kernel = row.kernel(PackedMatrix.of(q))
        assert refuse_shared(q.spec) is None
        for dtype in (torch.float32, torch.bfloat16):
            assert kernel.rows(ids, dtype).equal(q.dequantize(dtype)[ids])
            for quantizer in (None, TOKEN):
                assert kernel_of(q, quantizer, reference).rows(ids, dtype).equal(q.dequantize(dtype)[ids])


def test_experts_with_an_order():
    qs = [hand_made(SPECS["act-order"], 24, 64, seed) for seed in range(3)]
    experts = QuantExperts([[QuantLinear(kernel_of(q, TOKEN))] for q in qs])
    x = inputs(5, 64)
    for i, q in enumerate(qs):
        torch.testing.assert_close(x @ experts[i].T, TOKEN(x) @ q.dequantize().T, rtol=1e-5, atol=1e-5)


def test_an_order_beside_other_inputs():
    spec = SPECS["act-order"]
    threshold = InputQuantizer(PRESETS["LLM_INT8"].input or INT8_INPUTS)
    x = inputs(4, 512)
    x[1, 7], x[2, 100] = 9.0, -8.0
    q = hand_made(spec, 40, 512)
    expected = threshold(x) @ q.dequantize().T
    torch.testing.assert_close(kernel_of(q, threshold).call(x), expected, rtol=1e-4, atol=1e-3)
    clusters = replace(STATIC.spec, clusters=4)
    assert "beside inputs in groups of channels" in str(find_linear(spec, clusters, "cpu"))
    groups = PRESETS["MXFP4"].input
    ordered = replace(PRESETS["MXFP4"].weight, ordered=True)
    assert "beside inputs in groups of channels" in str(find_linear(ordered, groups, "cpu"))
    assert find_embedding(spec, "cpu") == "embeddings with an order of their columns"
    binary = QuantSpec(get_format("binary"), per_group(32), zero_point="minimum", minimum=FP32)
    assert find_linear(binary, INT8_INPUTS, "cpu") == "binary weights with minima and quantized inputs"
    assert not isinstance(find_linear(binary, None, "cpu"), str)
