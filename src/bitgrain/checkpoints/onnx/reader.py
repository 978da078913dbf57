"""Which matrices of an ONNX file are quantized, and their QTensors: of our files, and of onnxruntime's quantizers.

Found by the nodes: DequantizeLinear of a constant that a MatMul or Gemm takes as its right side, MatMulNBits, and
MatMulInteger with the constant scale that ours (`NAME.scale`) and onnxruntime's dynamic quantizer (`NAME_scale` for
`NAME_quantized`) name after the weight. Columns in an order of their own (act-order) are found by the Gather of the
inputs with our constant `NAME.order`. External data is read from beside the file only, never past its end; nothing is
read but what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.checkpoints.onnx.form import FLOAT, FLOAT16, INT32, UINT8, need_onnx
from bitgrain.checkpoints.onnx.qdq import TYPES
from bitgrain.errors import CheckpointError, NumericsError, SchemeError
from bitgrain.numerics import Granularity, IntFormat, QTensor, QuantSpec
from bitgrain.numerics.formats import FP16, FP32, Format
from bitgrain.numerics.packed import check_order
from bitgrain.numerics.packing import unpack

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_LARGEST_GRAPH = 2**31
"""Bytes of a protobuf message at most."""
_FORMATS: dict[int, Format] = {code: format for format, code in TYPES.items()}
_SCALES = {FLOAT: (torch.float32, FP32), FLOAT16: (torch.float16, FP16)}


@dataclass(frozen=True)
class OnnxMatrix:
    """A quantized weight [out, in]. name: of its constant; kind: the node that multiplies or dequantizes it."""

    name: str
    kind: str
    shape: tuple[int, int]
    spec: QuantSpec


class OnnxFile:
    """The quantized matrices of an ONNX file, by name.

    Raises CheckpointError for a file that is damaged, or whose constants point outside its folder or past a file's end.
    """

    def __init__(self, path: str | Path) -> None:
        need_onnx()
        self.path = Path(path)
        self._proto = _parse(self.path)
        graph = self._proto.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        gathers = [one for one in graph.node if one.op_type == "Gather" and _number(one, "axis", 0) == -1]
        self._gathered = {one.input[1] for one in gathers if len(one.input) > 1}
        self._nodes: dict[str, tuple[NodeProto, bool]] = {}
        self.matrices: dict[str, OnnxMatrix] = {}
        for one, flipped in _weights(self._proto, self._constants):
            try:
                q = self._ordered(self._spec(one, flipped))
            except (SchemeError, KeyError, ValueError, ZeroDivisionError) as error:
                raise CheckpointError(f"{self.path}: node {one.name!r} ({one.op_type}): {error}") from error
            self._nodes[q.name] = one, flipped
            self.matrices[q.name] = q

    def read(self, name: str) -> QTensor:
        """The matrix of that name. Raises CheckpointError."""
        one, flipped = self._nodes[name]
        matrix = self.matrices[name]
        try:
            plain = replace(matrix, spec=replace(matrix.spec, ordered=False))
            q = self._nbits(one, plain) if one.op_type == "MatMulNBits" else self._dense(one, flipped, plain)
            return self._placed(q, matrix)
        except (NumericsError, SchemeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error

    def kept(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the constants that are no part of a quantized matrix, by name."""
        from onnx import TensorProto

        taken = set(self.matrices)
        for name, (one, _) in self._nodes.items():
            parts = (*self._companions(one, name), self._order(name))
            taken |= {part.name for part in parts if part is not None}
        return {
            name: (tuple(tensor.dims), TensorProto.DataType.Name(tensor.data_type).lower())
            for name, tensor in self._constants.items()
            if name not in taken
        }

    def _spec(self, one: NodeProto, flipped: bool) -> OnnxMatrix:
        weight = self._constants[one.input[_WEIGHT[one.op_type]]]
        scale, zero = self._companions(one, weight.name)
        storage = _SCALES[scale.data_type][1]
        if one.op_type == "MatMulNBits":
            bits, block = _number(one, "bits", 4), _number(one, "block_size", 0)
            rows, cols = _number(one, "N", 0), _number(one, "K", 0)
            if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or rows < 1 or cols < 1:
                raise ValueError(f"bits {bits}, block_size {block}, N {rows}, K {cols}")
            if len(one.input) > 4 and one.input[4]:
                raise ValueError("g_idx is not read")
            if zero is not None and zero.data_type != UINT8:
                raise ValueError("zero points that are no codes are not read")
            across = -(-cols // block)
            _expect(weight, rows * across * block * bits // 8)
            _expect(scale, rows * across)
            if zero is not None:
                _expect(zero, rows * -(-across * bits // 8))
            spec = QuantSpec(
                IntFormat(bits, zero is None),
                Granularity(1, block),
                "none" if zero is None else "integer",
                scale=storage,
            )
            return OnnxMatrix(weight.name, one.op_type, (rows, cols), spec)
        if len(weight.dims) != 2 or min(weight.dims) < 1:
            raise ValueError(f"a weight of shape {list(weight.dims)}")
        shape = (weight.dims[0], weight.dims[1]) if flipped else (weight.dims[1], weight.dims[0])
        axis, block = _number(one, "axis", 1) % 2, _number(one, "block_size", 0)
        inner = axis == (1 if flipped else 0)  # along the inputs
        if block:
            size = [-(-n // block) if i == axis else n for i, n in enumerate(weight.dims)]
            granularity = Granularity(1, block) if inner else Granularity(block, 1)
        elif math.prod(scale.dims) == 1:
            size, granularity = [1], Granularity(None, None)
        else:
            size, granularity = [weight.dims[axis]], Granularity(None, 1) if inner else Granularity(1, None)
        _expect(scale, math.prod(size))
        kinds = {weight.data_type} if zero is None else {weight.data_type, zero.data_type}
        if len(kinds) > 1 or (zero is not None and math.prod(zero.dims) not in (1, math.prod(size))):
            raise ValueError("its zero points are of another kind or number than its scales")
        format = _FORMATS[weight.data_type]
        offset = zero is not None and isinstance(format, IntFormat)  # that of floats is a plain 0
        spec = QuantSpec(format, granularity, "integer" if offset else "none", scale=storage)
        return OnnxMatrix(weight.name, one.op_type, shape, spec)

    def _ordered(self, matrix: OnnxMatrix) -> OnnxMatrix:
        """The same with an order of its columns where it has one; rows with one scale need none."""
        order = self._order(matrix.name)
        if order is None:
            return matrix
        if order.data_type != INT32:
            raise ValueError(f"{order.name} is no int32")
        _expect(order, matrix.shape[1])
        return replace(matrix, spec=replace(matrix.spec, ordered=matrix.spec.granularity.cols is not None))

    def _placed(self, q: QTensor, matrix: OnnxMatrix) -> QTensor:
        """`q`, whose columns lie as the file has them, with their order, or each in its place."""
        constant = self._order(matrix.name)
        if constant is None:
            return q
        order = self._bytes(constant).view(torch.int32)
        check_order(order, matrix.shape[1], constant.name)
        if matrix.spec.ordered:
            return replace(q, spec=matrix.spec, order=order)
        return replace(q, codes=torch.empty_like(q.codes).index_copy_(1, order.to(torch.int64), q.codes))

    def _order(self, weight: str) -> TensorProto | None:
        """The constant that says for which input each column of a weight is; None where they are in order."""
        name = f"{weight}.order"
        return self._constants.get(name) if name in self._gathered else None

    def _companions(self, one: NodeProto, weight: str) -> tuple[TensorProto, TensorProto | None]:
        """The constants that are the scale and the zero point of a weight."""
        if one.op_type == "MatMulInteger":
            stem = weight.removesuffix("_quantized")
            scale = self._constants.get(f"{stem}_scale") or self._constants[f"{weight}.scale"]
            zero = self._constants.get(one.input[3]) if len(one.input) > 3 else None
            return scale, zero
        first = 2 if one.op_type == "MatMulNBits" else 1
        zero = one.input[first + 1] if len(one.input) > first + 1 else ""
        return self._constants[one.input[first]], self._constants[zero] if zero else None

    def _nbits(self, one: NodeProto, matrix: OnnxMatrix) -> QTensor:
        (rows, cols), spec = matrix.shape, matrix.spec
        bits = spec.format.bits
        across = spec.granularity.tiles(matrix.shape)[1]
        scale, zero = self._companions(one, matrix.name)
        words = self._bytes(self._constants[matrix.name]).view(rows, -1)
        padded = words.shape[1] * 8 // bits
        codes = unpack(words, bits, padded)[:, :cols].to(torch.int16)
        scales = self._bytes(scale).view(_SCALES[scale.data_type][0]).view(rows, across)
        if zero is None:
            codes = codes - 2 ** (bits - 1)
        zeros = None if zero is None else unpack(self._bytes(zero).view(rows, -1), bits, across)
        kind = spec.format.code_dtype
        return QTensor(codes.to(kind).contiguous(), scales, None if zeros is None else zeros.to(kind), spec)

    def _dense(self, one: NodeProto, flipped: bool, matrix: OnnxMatrix) -> QTensor:
        spec = matrix.spec
        down, across = spec.granularity.tiles(matrix.shape)
        scale, zero = self._companions(one, matrix.name)

        def oriented(flat: Tensor, rows: int, cols: int) -> Tensor:
            return (flat.reshape(rows, cols) if flipped else flat.reshape(cols, rows).T).contiguous()

        codes = oriented(self._codes(self._constants[matrix.name], spec.format), *matrix.shape)
        scales = self._bytes(scale).view(_SCALES[scale.data_type][0])
        zeros: Tensor | None = None
        if zero is not None and spec.zero_point == "integer":
            known = self._codes(zero, spec.format)
            zeros = oriented(known.expand(down * across) if known.numel() == 1 else known, down, across)
        return QTensor(codes, oriented(scales, down, across), zeros, spec)

    def _codes(self, tensor: TensorProto, format: Format) -> Tensor:
        """A constant's codes, flat, in the format's dtype."""
        found = unpack(self._bytes(tensor).view(1, -1), format.bits, math.prod(tensor.dims)).view(-1)
        if isinstance(format, IntFormat) and format.is_signed:
            half = 2 ** (format.bits - 1)
            return ((found ^ half).to(torch.int16) - half).to(format.code_dtype)
        return found.to(format.code_dtype)

    def _bytes(self, tensor: TensorProto) -> Tensor:
        """A constant's bytes, wherever they are. Raises CheckpointError unless they are as many as its shape says."""
        from onnx import TensorProto, helper

        size = math.prod(tensor.dims)
        bits = _FORMATS[tensor.data_type].bits if tensor.data_type in _FORMATS else 32
        bits = 16 if tensor.data_type == FLOAT16 else bits
        nbytes = -(-size * bits // 8)
        if tensor.data_location == TensorProto.EXTERNAL:
            data = self._external(tensor, nbytes)
        elif tensor.HasField("raw_data"):
            data = tensor.raw_data
        else:
            values: Any = getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))
            wide = torch.int32 if tensor.data_type == INT32 else torch.float32
            kind = {32: wide, 16: torch.int16}.get(bits, torch.uint8)  # integers hold the bits of the others
            data = torch.tensor(list(values)).to(kind).view(torch.uint8).numpy().tobytes()
        if len(data) != nbytes:
            raise CheckpointError(f"{self.path}: {tensor.name} has {len(data)} bytes, its shape says {nbytes}")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _external(self, tensor: TensorProto, nbytes: int) -> bytes:
        said = {entry.key: entry.value for entry in tensor.external_data}
        location: Any = said.get("location", "")
        if not isinstance(location, str):  # bytes that are no UTF-8 stay bytes
            raise CheckpointError(f"{self.path}: {tensor.name} names no file")
        beside = self.path.parent.resolve() / location
        if not location or Path(location).name != location or beside.is_symlink() or not beside.is_file():
            raise CheckpointError(f"{self.path}: {tensor.name} lies in {location!r}, which is no file beside it")
        try:
            offset, length = int(said.get("offset", "0")), int(said.get("length", str(nbytes)))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {tensor.name} has no sound offset or length") from error
        if length != nbytes or offset < 0 or offset + nbytes > beside.stat().st_size:
            raise CheckpointError(f"{self.path}: {tensor.name} reaches past the end of {location}, or has another size")
        with beside.open("rb") as file:
            file.seek(offset)
            return file.read(nbytes)


_WEIGHT = {"DequantizeLinear": 0, "MatMulNBits": 1, "MatMulInteger": 1}


def _parse(path: Path) -> ModelProto:
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    try:
        if path.stat().st_size >= _LARGEST_GRAPH:
            raise CheckpointError(f"{path} is larger than a protobuf message can be")
        proto = ModelProto()
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is no ONNX file, or is damaged: {error}") from error
    return proto


def _weights(proto: ModelProto, constants: dict[str, TensorProto]) -> Iterator[tuple[NodeProto, bool]]:
    """Nodes with a quantized constant that is a linear layer's weight, and whether it lies as [out, in]."""
    users: dict[str, list[NodeProto]] = {}
    for one in proto.graph.node:
        for value in one.input:
            users.setdefault(value, []).append(one)
    for one in proto.graph.node:
        place = _WEIGHT.get(one.op_type)
        if place is None or len(one.input) <= place or one.input[place] not in constants:
            continue
        if one.op_type != "DequantizeLinear":
            yield one, False
            continue
        if len(one.input) < 2 or not one.output or len(constants[one.input[0]].dims) != 2:
            continue
        for user in users.get(one.output[0], []):
            between = user.op_type == "Transpose" and bool(user.output)
            value = user.output[0] if between else one.output[0]
            lasts = users.get(value, []) if between else [user]
            last = next((u for u in lasts if u.op_type in ("MatMul", "Gemm") and list(u.input[1:2]) == [value]), None)
            if last is not None:
                yield one, between != bool(_number(last, "transB", 0))
                break


def _number(one: NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in one.attribute if a.name == name), default)


def _expect(tensor: TensorProto, count: int) -> None:
    if math.prod(tensor.dims) != count:
        raise ValueError(f"{tensor.name} has {math.prod(tensor.dims)} numbers, {count} are needed")
