"""One linear layer in each form, as onnxruntime multiplies by it, against the QTensor."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.form import Product
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.checkpoints.onnx.graph import Surgeon
from bitgrain.errors import PlanError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_block, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import respell
from bitgrain.recipes import Scheme

SPECS = {
    "int4 g32": QuantSpec(get_format("int4"), per_group(32)),
    "int4 g32 asymmetric": QuantSpec(get_format("int4"), per_group(32), zero_point="integer"),
    "uint4 g16": QuantSpec(get_format("uint4"), per_group(16), zero_point="integer"),
    "int8 channel": QuantSpec(get_format("int8"), per_channel()),
    "uint8 channel": QuantSpec(get_format("uint8"), per_channel(), zero_point="integer"),
    "int8 tensor": QuantSpec(get_format("int8"), per_tensor()),
    "int8 blocks": QuantSpec(get_format("int8"), per_block(4, 32)),
    "int2 g16": QuantSpec(get_format("int2"), per_group(16)),
    "fp8 g32": QuantSpec(get_format("fp8_e4m3"), per_group(32)),
    "fp8_e5m2 channel": QuantSpec(get_format("fp8_e5m2"), per_channel(), scale=get_format("float16")),
}


def layer_of(spec: QuantSpec, rows: int, cols: int, inputs: QuantSpec | None = None) -> StoredLayer:
    scheme = Scheme("test", spec, inputs)
    return StoredLayer("w", "w", "w", "Linear", "linear", rows, cols, 1, False, torch.float32, scheme)


def multiply(form: str, layer: StoredLayer, q: QTensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T + bias as onnxruntime computes it from the form's nodes and bytes."""
    rows, _ = layer.shape
    chosen = FORMS[form]
    bias = helper.make_tensor("b", TensorProto.FLOAT, (rows,), [1.0] * rows)
    constants = [bias]
    data = chosen.encode(layer, PackedMatrix.of(q), [])
    for one in chosen.initializers(layer):
        assert data[one.name].numel() == one.nbytes
        constants.append(
            helper.make_tensor(one.name, one.data_type, one.dims, data[one.name].numpy().tobytes(), raw=True)
        )
    constants += [helper.make_tensor(name, *one) for name, one in chosen.inline(layer).items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * x.ndim)
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)
    graph = helper.make_graph(chosen.nodes(layer, Product("x", "y", "b")), "main", [given], [taken], constants)
    opsets = [helper.make_opsetid(*pair) for pair in {"": 21, **chosen.domains}.items()]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    model = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(model.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("shape", [(6, 64), (7, 96), (5, 33), (130, 1056)], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_numbers(form: str, name: str, shape: tuple[int, int]):
    spec, generator = SPECS[name], torch.Generator().manual_seed(0)
    layer = layer_of(spec, *shape)
    refusal = FORMS[form].refusal(layer)
    if refusal is not None:
        assert ("fp8" in name and form == "onnx-nbits") or ("int2" in name and form == "onnx-qdq")
        return
    q = quantize(torch.randn(shape, generator=generator), spec)
    x = torch.randn(2, 3, shape[1], generator=generator)
    torch.testing.assert_close(multiply(form, layer, q, x), x @ q.dequantize().T + 1, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_columns_in_an_order_of_their_own(form: str):
    generator = torch.Generator().manual_seed(0)
    plain = quantize(torch.randn(6, 64, generator=generator), SPECS["int4 g32"])
    order = torch.randperm(64, generator=generator).to(torch.int32)
    q = QTensor(plain.codes, plain.scale, None, replace(plain.spec, ordered=True), order=order)
    x = torch.randn(2, 64, generator=generator)
    got = multiply(form, layer_of(q.spec, 6, 64), q, x)
    torch.testing.assert_close(got, x @ q.dequantize().T + 1, rtol=1e-5, atol=1e-3)


def test_symmetric_codes_without_a_sign_get_zero_points():
    """MatMulNBits without zero points means 2 ** (bits - 1)."""
    form, generator = FORMS["onnx-nbits"], torch.Generator().manual_seed(0)
    q = QTensor(
        torch.randint(0, 16, (6, 64), generator=generator).to(torch.uint8),
        torch.rand(6, 2, generator=generator),
        None,
        QuantSpec(get_format("uint4"), per_group(32)),
    )
    layer, said = layer_of(q.spec, 6, 64), replace(q.spec, zero_point="integer")
    assert "are signed, not uint4" in (form.refusal(layer) or "")
    assert said in form.spellings(layer)
    x = torch.randn(2, 64, generator=generator)
    got = multiply("onnx-nbits", layer_of(said, 6, 64), respell(q, said), x)
    torch.testing.assert_close(got, x @ q.dequantize().T + 1, rtol=1e-5, atol=1e-3)


def test_integer_products_with_tokens_of_zeros_and_large_numbers():
    """Codes at both ends, where 16-bit sums of products would overflow."""
    int8 = QuantSpec(get_format("int8"), per_channel(), restricted=True, dynamic=True)
    x = torch.ones(3, 64) * 1e4
    x[0] = 0
    x[2, ::2] = -1e4
    q = quantize(torch.ones(6, 64), SPECS["int8 channel"])
    got = multiply("onnx-qdq", layer_of(q.spec, 6, 64, int8), q, x)
    torch.testing.assert_close(got, x @ q.dequantize().T + 1, rtol=1e-5, atol=1e-2)


def test_another_use_of_a_quantized_weight_is_refused():
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 64])
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 64])
    graph = helper.make_graph([helper.make_node("Abs", ["w"], ["y"])], "main", [weight], [taken])
    surgeon = Surgeon(helper.make_model(graph))
    with pytest.raises(PlanError, match="used by Abs"):
        surgeon.quantize("w", layer_of(SPECS["int4 g32"], 6, 64), FORMS["onnx-qdq"])
