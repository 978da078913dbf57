"""The reader of ONNX files: what onnxruntime's own quantizers made, and files that lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitgrain.checkpoints.linear_layers import linear_layer
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.checkpoints.onnx.reader import OnnxFile
from bitgrain.errors import CheckpointError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, per_group, quantize
from conversion_steps import Held, IntoOnnx

ROWS, COLS = 48, 128


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COLS, ROWS)).astype(np.float32)


def dense_model(weight: np.ndarray) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([product], "main", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_onnxruntime(path: Path) -> torch.Tensor:
    """The weight [out, in] as onnxruntime multiplies by it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(model.run(None, {"x": np.eye(COLS, dtype=np.float32)})[0]).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmulnbits_of_onnxruntimes_quantizer(bits: int, symmetric: bool, weight: np.ndarray, tmp_path: Path):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(dense_model(weight), block_size=32, is_symmetric=symmetric, bits=bits)
    made.process()
    made.model.save_model_to_file(str(tmp_path / "m.onnx"), use_external_data_format=True)
    file = OnnxFile(tmp_path / "m.onnx")
    (found,) = file.matrices.values()
    assert (found.shape, found.spec.format.bits, found.spec.symmetric) == ((ROWS, COLS), bits, symmetric)
    assert found.spec.granularity.cols == 32
    torch.testing.assert_close(file.read(found.name).dequantize(), by_onnxruntime(tmp_path / "m.onnx"))


def test_dynamic_int8_of_onnxruntimes_quantizer(weight: np.ndarray, tmp_path: Path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(dense_model(weight), str(tmp_path / "f.onnx"))
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "m.onnx", weight_type=QuantType.QInt8)
    file = OnnxFile(tmp_path / "m.onnx")
    (found,) = file.matrices.values()
    assert (found.kind, found.shape) == ("MatMulInteger", (ROWS, COLS))
    error = file.read(found.name).dequantize() - torch.from_numpy(weight).T
    assert error.abs().max() <= np.abs(weight).max() / 127


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray) -> Path:
    """A file with external data, by hand."""
    folder = tmp_path_factory.mktemp("good")
    codes = np.random.default_rng(1).integers(0, 256, (ROWS, COLS // 32, 16), dtype=np.uint8)
    scales = np.random.default_rng(2).random((ROWS * COLS // 32,), dtype=np.float32)
    attributes = {"K": COLS, "N": ROWS, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    proto = dense_model(weight)
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.append(node)
    proto.graph.initializer.extend([numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")])
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, str(folder / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx"


def altered(good: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(str(good), load_external_data=False)
    change(proto)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    (folder / "m.data").write_bytes((good.parent / "m.data").read_bytes())
    return folder / "m.onnx"


def said(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


def attribute(name: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        next(a for a in proto.graph.node[0].attribute if a.name == name).i = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        said("location", "../m.data"),
        said("location", "/etc/passwd"),
        said("location", ""),
        said("location", "absent"),
        said("offset", "-1"),
        said("offset", str(10**12)),
        said("offset", "many"),
        said("length", "7"),
        attribute("bits", 3),
        attribute("block_size", 0),
        attribute("block_size", 1 << 60),
        attribute("K", -5),
        attribute("N", 1 << 62),
        lambda proto: proto.graph.initializer[0].dims.__setitem__(0, 1 << 40),
        lambda proto: proto.graph.initializer.pop(1),
        lambda proto: setattr(proto.graph.initializer[1], "data_type", 7),
    ],
)
def test_lies_are_errors(change: Callable[[onnx.ModelProto], None], good: Path, tmp_path: Path):
    path = altered(good, tmp_path, change)
    with pytest.raises(CheckpointError):
        read_all(path)


def read_all(path: Path) -> None:
    file = OnnxFile(path)
    for name in file.matrices:
        file.read(name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [32, 64])
def test_columns_come_back_with_their_order(group: int, form: str, tmp_path: Path):
    """Act-order; one group over all inputs is no group to DequantizeLinear, and needs no order."""
    generator = torch.Generator().manual_seed(0)
    plain = quantize(torch.randn(6, 64, generator=generator), QuantSpec(IntFormat(4), per_group(group)))
    order = torch.randperm(64, generator=generator).to(torch.int32)
    q = QTensor(plain.codes, plain.scale, None, replace(plain.spec, ordered=True), order=order)
    held = Held.of(linear_layer("m.up", 6, 64, q.spec, torch.float32), q)
    taken = IntoOnnx(FORMS[form]).take(held, tmp_path)
    assert taken is not None
    found = taken[1].matrices[0].unpack()
    assert found.spec.ordered == (group == 32 or form == "onnx-nbits")
    assert torch.equal(found.dequantize(), q.dequantize())
    file = OnnxFile(tmp_path / "model.onnx")
    assert not file.kept()
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[-256:] = data[-256:-252] * 64  # one column for all inputs
    (tmp_path / "model.onnx.data").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not name each once"):
        file.read("m.up.weight")


def test_a_link_out_of_the_folder_is_not_followed(good: Path, tmp_path: Path):
    path = altered(good, tmp_path, lambda proto: None)
    read_all(path)
    (tmp_path / "m.data").unlink()
    (tmp_path / "m.data").symlink_to(good.parent / "m.data")
    with pytest.raises(CheckpointError, match="no file beside it"):
        read_all(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_typed_error_or_a_matrix(data: st.DataObject, good: Path, tmp_path: Path):
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "m.onnx").write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    (tmp_path / "m.data").write_bytes((good.parent / "m.data").read_bytes())
    with contextlib.suppress(CheckpointError):
        read_all(tmp_path / "m.onnx")
