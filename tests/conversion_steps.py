"""One conversion of one quantized layer, by the code of `bitgrain convert`, into a real file and out of it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from bitgrain.checkpoints.gguf.blocks import BlockType
from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.types import BLOCK_TYPES
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.checkpoints.layout import Layout, StoredLayer, encode_packed
from bitgrain.checkpoints.layouts import WRITABLE
from bitgrain.checkpoints.onnx.form import Form
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.checkpoints.onnx.graph import DATA_FILE, Surgeon
from bitgrain.checkpoints.onnx.reader import OnnxFile
from bitgrain.numerics import QTensor
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import respell_packed
from bitgrain.pipeline.gguf_types import choose_type, refusal
from bitgrain.pipeline.spelling import respelled, spell
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import Scheme

QUANTIZED = {name: found for name, found in BLOCK_TYPES.items() if found.spec is not None}


@dataclass(frozen=True)
class Held:
    """A layer and its matrices in memory, packed as they were read; to `spelling`, the checkpoint that it lies in."""

    layer: StoredLayer
    matrices: list[PackedMatrix]

    @staticmethod
    def of(layer: StoredLayer, *parts: QTensor) -> Held:
        return Held(layer, [PackedMatrix.of(q) for q in parts])

    def packed(self, tensor: str) -> list[PackedMatrix]:
        assert tensor == self.layer.tensor
        return self.matrices

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([one.unpack().dequantize(dtype) for one in self.matrices])


class Step(Protocol):
    """A target of conversions.

    name  as `--to` has it
    """

    name: str

    def dtype(self, layer: StoredLayer) -> torch.dtype:
        """In which the numbers stay what they are."""
        ...

    def take(self, held: Held, folder: Path) -> tuple[str, Held] | None:
        """What was written, and `held` as it is read again; None where it is refused."""
        ...


class IntoFolder:
    """A layout of safetensors folders. Its readers multiply in the model's own dtype, so that is what is promised: a
    bfloat16 model's layer is the same in bfloat16, though two ways to say it may differ before that last rounding."""

    def __init__(self, layout: Layout) -> None:
        self.name, self._layout = layout.name, layout

    def dtype(self, layer: StoredLayer) -> torch.dtype:
        return layer.dtype

    def take(self, held: Held, folder: Path) -> tuple[str, Held] | None:
        layout, stated = self._layout, held.layer.dtype
        layer = spell(held, held.layer, layout)  # type: ignore[arg-type]
        if isinstance(layer, str):
            return None
        tensors = encode_packed(layout, layer, respelled(replace(held, layer=layer), layer))  # type: ignore[arg-type]
        told = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in layout.tensors(layer)}
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == told
        save_file({**tensors, "m.norm.weight": torch.ones(4, dtype=stated)}, folder / "model.safetensors")
        config = {"dtype": str(stated).removeprefix("torch."), **dict.fromkeys(layout.keys, layout.config([layer], []))}
        (folder / "config.json").write_text(json.dumps(config))
        stored = QuantizedCheckpoint(folder)
        assert stored.layout is layout
        (found,) = stored.layers.values()
        assert (found.tensor, found.shape, found.experts) == (layer.tensor, layer.shape, layer.experts)
        assert found.transposed == layer.transposed
        assert found.scheme.input == layer.scheme.input
        held = Held(found, stored.packed(found.tensor))
        plain = torch.stack([q.dequantize() for q in stored.quantized(found.tensor)])
        assert torch.equal(held.numbers(torch.float32), plain)
        assert torch.equal(held.numbers(found.dtype).to(stated), held.numbers(stated)), found.dtype
        return self.name, held


class IntoGguf:
    """A GGUF file: float32, which is what llama.cpp decodes blocks to, whatever the original was. What a bfloat16 layer
    is in float32 says what it is in bfloat16, and from here on it is a float32 layer. `wanted`: a type asked for."""

    def __init__(self, wanted: BlockType | None = None) -> None:
        self.name, self._wanted = f"gguf:{wanted.name.lower()}" if wanted else "gguf", wanted

    def dtype(self, layer: StoredLayer) -> torch.dtype:
        return torch.float32

    def take(self, held: Held, folder: Path) -> tuple[str, Held] | None:
        layer, count = held.layer, len(held.matrices)
        kind = choose_type(layer, self._wanted, lambda one: refusal(layer, lambda: held.matrices, one))
        if isinstance(kind, str):
            return None
        rows = [kind.pack(respell_packed(one, kind.spec, compared=True)) for one in held.matrices]
        name, shape = "blk.0.ffn_up.weight", layer.shape if count == 1 else (count, *layer.shape)
        plan = plan_gguf({"general.architecture": "llama"}, [("norm", "F32", (4,)), (name, kind.name, shape)])
        path = folder / "model.gguf"
        path.unlink(missing_ok=True)
        with GgufWriter(path, plan) as writer:
            writer.write("norm", BLOCK_TYPES["F32"].store(torch.ones(1, 4)))
            writer.write(name, torch.cat(rows))
            writer.finish()
        file = open_gguf(path)
        tensor = file.tensors[name]
        assert (tensor.type, tensor.shape) == (kind.name, shape)
        each = [(i * layer.out_features, (i + 1) * layer.out_features) for i in range(count)]
        read = BLOCK_TYPES[tensor.type]
        parts = [read.unpack(file.read_rows(name, *one), layer.shape) for one in each]
        found = replace(layer, dtype=torch.float32, scheme=Scheme(read.name, parts[0].spec))
        return f"gguf:{kind.name}", Held.of(found, *parts)


class IntoOnnx:
    """An ONNX file: float32 as well, in which DequantizeLinear and MatMulNBits multiply."""

    def __init__(self, form: Form) -> None:
        self.name, self._form = form.name, form

    def dtype(self, layer: StoredLayer) -> torch.dtype:
        return torch.float32

    def take(self, held: Held, folder: Path) -> tuple[str, Held] | None:
        form = self._form
        layer = spell(held, held.layer, form, torch.float32)  # type: ignore[arg-type]
        if isinstance(layer, str):
            return None
        (packed,) = respelled(replace(held, layer=layer), layer)  # type: ignore[arg-type]
        data = form.encode(layer, packed, [])
        surgeon = Surgeon(_product(layer))
        surgeon.quantize(layer.tensor, layer, form)
        offsets, written = dict[str, int](), b""
        for one in form.initializers(layer):
            assert data[one.name].numel() == one.nbytes
            offsets[one.name] = len(written)
            written += data[one.name].numpy().tobytes()
        proto = surgeon.finish(form, offsets, {})
        (folder / DATA_FILE).write_bytes(written)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
        file = OnnxFile(folder / "model.onnx")
        assert {name: one.shape for name, one in file.matrices.items()} == {layer.tensor: layer.shape}
        q = file.read(layer.tensor)
        assert q.spec == file.matrices[layer.tensor].spec
        found = replace(layer, dtype=torch.float32, scheme=replace(layer.scheme, weight=q.spec))
        return f"{self.name}:{file.matrices[layer.tensor].kind}", Held.of(found, q)


def _product(layer: StoredLayer) -> Any:
    """The graph of a linear layer as it is traced, its weight an input, as `Surgeon` takes it."""
    rows, cols = layer.shape
    shape = (cols, rows) if layer.transposed else (rows, cols)
    nodes = [helper.make_node("MatMul", ["input_ids", layer.tensor if layer.transposed else "turned"], ["y"])]
    if not layer.transposed:
        nodes.insert(0, helper.make_node("Transpose", [layer.tensor], ["turned"], perm=[1, 0]))
    inputs = {"input_ids": ("n", cols), layer.tensor: shape}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", rows))
    return helper.make_model(
        helper.make_graph(nodes, "main", given, [taken]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        *map(IntoFolder, WRITABLE.values()),
        IntoGguf(),
        *map(IntoGguf, QUANTIZED.values()),
        *map(IntoOnnx, FORMS.values()),
    )
}
REACHED = {
    *WRITABLE,
    *(f"gguf:{name}" for name in QUANTIZED),
    *("onnx-qdq:DequantizeLinear", "onnx-qdq:MatMulInteger", "onnx-nbits:MatMulNBits"),
}
"""What `Step.take` may say was written: a layout, a GGUF file's type, an ONNX form's node."""
