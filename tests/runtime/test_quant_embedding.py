"""Packed embeddings: what one with the dequantized weight gives, bit for bit, and what modules must be able to."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from bitgrain.errors import KernelError, SchemeError
from bitgrain.kernels.native import is_available
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.embedding_rows import find_embedding
from bitgrain.runtime.kernel_arguments import refuse_shared
from bitgrain.runtime.linear_rows import INT8_INPUTS, find_linear
from bitgrain.runtime.low_bit_linear import held_nbytes
from bitgrain.runtime.quant_embedding import QuantEmbedding, quant_embedding
from bitgrain.runtime.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(not is_available(), reason="the native module was not built")

NAMES = ("W8A8", "W4A16", "W4A16_ASYM", "W3A16_ASYM", "W2A16", "NF4", "NVFP4A16", "MXFP4A16", "FP8", "TERNARY")
IDS = torch.tensor([[1, 5, 39], [0, 7, 7]])
TOKEN = InputQuantizer(INT8_INPUTS)


def weight_of(spec: QuantSpec, rows: int = 40, seed: int = 1) -> QTensor:
    return quantize(torch.randn(rows, 192, generator=torch.Generator().manual_seed(seed)), spec)


def dense_of(q: QTensor, dtype: torch.dtype = torch.float32, scaled: bool = False, **settings: Any) -> nn.Embedding:
    """With the weight as a checkpoint of bfloat16 has it."""
    made = Gemma3TextScaledWordEmbedding(40, 192, 0, 3.3) if scaled else nn.Embedding(40, 192, **settings)
    made.weight.data = q.dequantize(torch.bfloat16)
    return made.to(dtype).requires_grad_(False)


def packed_of(q: QTensor, old: nn.Embedding, reference: bool = False) -> QuantEmbedding:
    row = find_embedding(q.spec, "cpu", reference=reference)
    assert not isinstance(row, str), row
    return quant_embedding(old, row.kernel(PackedMatrix.of(q)), torch.bfloat16)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name: str, scaled: bool, reference: bool):
    q = weight_of(PRESETS[name].weight)
    for dtype in (torch.float32, torch.bfloat16):
        old = dense_of(q, dtype, scaled)
        layer = packed_of(q, old, reference)
        assert isinstance(layer, type(old))
        assert layer(IDS).equal(old(IDS))
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, old.weight)
        assert layer.qtensor().codes.equal(q.codes)


@pytest.mark.parametrize("quantizer", [None, TOKEN])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_out_of_a_head_are_the_same_bits(name: str, reference: bool, quantizer: InputQuantizer | None):
    q = weight_of(PRESETS[name].weight)
    row = find_linear(q.spec, None if quantizer is None else quantizer.spec, "cpu", reference=reference)
    if isinstance(row, str):
        assert name in ("FP8", "NF4", "NVFP4A16", "MXFP4A16")
        return
    kernel = row.kernel(PackedMatrix.of(q), quantizer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernel.rows(IDS, dtype).equal(q.dequantize(dtype)[IDS])


def test_what_an_embedding_is_told():
    q = weight_of(PRESETS["W4A16"].weight)
    old = dense_of(q, padding_idx=3, max_norm=1.5)
    layer = packed_of(q, old)
    assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (3, 40, 192)
    assert layer(IDS).equal(old(IDS))
    with pytest.raises(KernelError, match="40 is no row of an embedding of 40"):
        layer(torch.tensor([40]))


def test_functions_that_are_given_the_weight():
    q = weight_of(PRESETS["W4A16"].weight)
    old = dense_of(q)
    layer, x = packed_of(q, old), torch.randn(2, 192)
    assert F.embedding(IDS, layer.weight).equal(old(IDS))
    assert F.linear(x, layer.weight).equal(F.linear(x, old.weight))
    assert layer.weight[3:5].equal(old.weight[3:5])
    with pytest.raises(SchemeError, match="cannot be changed in place"):
        layer.weight.data = old.weight


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["W4A16_ASYM", "NVFP4A16"])
def test_copies_and_casts(name: str, scaled: bool):
    q = weight_of(PRESETS[name].weight)
    layer: Any = packed_of(q, dense_of(q, scaled=scaled))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies: list[Any] = [copy.deepcopy(layer), torch.load(stream, weights_only=False)]
    other = packed_of(weight_of(q.spec, seed=2), dense_of(q, scaled=scaled))
    assert not other(IDS).equal(layer(IDS))
    other.load_state_dict(layer.state_dict())
    for one in (*copies, other):
        assert type(one) is type(layer)
        assert one(IDS).equal(layer(IDS))
    assert copies[0].words.data_ptr() != layer.words.data_ptr()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(IDS).equal(dense_of(q, torch.bfloat16, scaled)(IDS))
    with pytest.raises(SchemeError, match="run on the CPU, not on meta"):
        copy.deepcopy(layer).to("meta")
    with pytest.raises(RuntimeError, match="packed_codes"):
        layer.load_state_dict({})


class Tied(nn.Module):
    """An embedding and a head with one kernel."""

    def __init__(self, q: QTensor, quantizer: InputQuantizer | None) -> None:
        super().__init__()
        row = find_linear(q.spec, None if quantizer is None else quantizer.spec, "cpu")
        assert not isinstance(row, str), row
        kernel = row.kernel(PackedMatrix.of(q), quantizer)
        self.embed = quant_embedding(dense_of(q), kernel, torch.bfloat16)
        self.head = QuantLinear(kernel, stored=torch.bfloat16, tied=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("quantizer", [None, TOKEN])
def test_tied_to_a_head(quantizer: InputQuantizer | None):
    q = weight_of(PRESETS["W4A16"].weight)
    model = Tied(q, quantizer)
    expected = model(IDS)
    assert held_nbytes(model) == model.embed.packed_nbytes
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"embed"}
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert other.embed.kernel is other.head.kernel
        assert other.embed.kernel is not model.embed.kernel
        assert other(IDS).equal(expected)
    other = Tied(weight_of(q.spec, seed=2), quantizer)
    other.load_state_dict(state)
    assert other(IDS).equal(expected)  # the head too
    assert other.head.weight.equal(model.embed.weight)
    assert held_nbytes(other) == held_nbytes(model)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str, scaled: bool):
    q = weight_of(PRESETS["W4A16"].weight)
    layer = packed_of(q, dense_of(q, torch.bfloat16, scaled))
    with torch.no_grad():
        assert torch.compile(layer, backend=backend, fullgraph=True)(IDS).equal(layer(IDS))
    torch.compiler.reset()


def test_what_no_kernel_serves():
    assert find_embedding(QuantSpec(get_format("int16"), per_group(32)), "cpu") == "embeddings in int16"
    beside = QuantSpec(get_format("int3"), per_group(32), outliers=0.02)
    assert find_embedding(beside, "cpu") == "embeddings with outliers or columns apart"
    real = QuantSpec(get_format("uint4"), per_group(32), zero_point="real")
    assert refuse_shared(real) == "real zero points of an embedding tied to the head"
    assert not isinstance(find_embedding(real, "cpu"), str)
