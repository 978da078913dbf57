"""onnx-qdq: weights by DequantizeLinear of opset 21 (ONNX operator specification), which multiplies in float32.

Codes lie as [in, out] and are dequantized along axis 0 in blocks, or along axis 1 with a scale for each output; that is
the form that onnxruntime turns into its low-bit product. (v - z) * s is what a QTensor means, in float32, whatever the
storage of the scales was: they are widened, exactly.

int8 weights per channel with int8 inputs per token go through MatMulInteger. Both sides are uint8 with the zero point
128: kernels of x86 without VNNI add products of uint8 and int8 in 16 bits, which overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.activations import (
    dynamic_codes,
    encode_inputs,
    inline_constants,
    input_initializers,
    input_refusal,
    node,
    rounded_inputs,
)
from bitgrain.checkpoints.onnx.form import (
    FLOAT,
    FLOAT8E4M3FN,
    FLOAT8E5M2,
    INT4,
    INT8,
    INT32,
    UINT4,
    UINT8,
    Constant,
    Initializer,
    Product,
    as_bytes,
    block_scales,
    block_zeros,
    code_bytes,
    common_refusal,
)
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.numerics import IntFormat, QuantSpec
from bitgrain.numerics.formats import BF16, E8M0, FP8_E4M3, FP8_E5M2, FP16, FP32, Format
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.packing import pack, transpose_nibbles, unpack

if TYPE_CHECKING:
    from onnx import NodeProto

TYPES: dict[Format, int] = {
    IntFormat(4): INT4,
    IntFormat(4, False): UINT4,
    IntFormat(8): INT8,
    IntFormat(8, False): UINT8,
    FP8_E4M3: FLOAT8E4M3FN,
    FP8_E5M2: FLOAT8E5M2,
}


class Qdq:
    """See `Form`."""

    name = "onnx-qdq"
    summary = "any ONNX engine of opset 21; int4, int8, fp8; inputs in int8 or fp8 too"
    domains: Mapping[str, int] = {}

    def refusal(self, layer: StoredLayer) -> str | None:
        spec = layer.scheme.weight
        if (found := common_refusal(layer)) is not None:
            return found
        if spec.format not in TYPES:
            return f"{layer.module}: DequantizeLinear of opset 21 has no {spec.format}; it has {_names()}"
        return input_refusal(layer)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        spec = layer.scheme.weight
        stores = [spec.scale, FP32, FP16, BF16, E8M0]
        return near_spellings(spec, tuple(TYPES), stores, ("none", "integer"))

    def initializers(self, layer: StoredLayer) -> list[Initializer]:
        spec, name = layer.scheme.weight, layer.tensor
        rows, cols = layer.shape
        across, kind = _across(layer), TYPES[spec.format]
        tiles = (rows,) if across == 1 else (across, rows)
        found = [
            Initializer(name, UINT8 if _is_integer(layer) else kind, (cols, rows), _nbytes(rows * cols, spec)),
            Initializer(f"{name}.scale", FLOAT, tiles, 4 * rows * across),
        ]
        if not spec.symmetric:
            found.append(Initializer(f"{name}.zero", kind, tiles, _nbytes(rows * across, spec)))
        if spec.ordered:
            found.append(Initializer(f"{name}.order", INT32, (cols,), 4 * cols))
        return found + input_initializers(layer)

    def encode(self, layer: StoredLayer, packed: PackedMatrix, inputs: Sequence[StaticInput]) -> dict[str, Tensor]:
        spec, name = layer.scheme.weight, layer.tensor
        flip = 0 if _is_integer(layer) else _flip(spec.format)
        found = {
            name: as_bytes(_transposed(packed, flip)),
            f"{name}.scale": as_bytes(block_scales(packed.scale, layer, _block(layer)).T),
        }
        if packed.zero is not None:
            zeros = block_zeros(packed.zero, layer, _block(layer)).T.contiguous() & (2**spec.format.bits - 1)
            found[f"{name}.zero"] = as_bytes(pack(zeros.reshape(-1).to(torch.uint8), spec.format.bits, torch.uint8))
        if packed.order is not None:
            found[f"{name}.order"] = as_bytes(packed.order)
        return found | encode_inputs(layer, inputs)

    def inline(self, layer: StoredLayer) -> dict[str, Constant]:
        offset: dict[str, Constant] = {"bitgrain.uint8.128": (UINT8, (), [128]), "bitgrain.128": (FLOAT, (), [128.0])}
        return inline_constants(layer) | (offset if _is_integer(layer) else {})

    def nodes(self, layer: StoredLayer, product: Product) -> list[NodeProto]:
        spec, name, prefix = layer.scheme.weight, layer.tensor, product.y
        nodes, x = ordered_inputs(layer, product.x, prefix)
        last = product.y if product.bias is None else f"{prefix}/product"
        if _is_integer(layer):
            nodes += _integer_product(layer, x, last, prefix)
        else:
            steps, x = rounded_inputs(layer, x, prefix)
            nodes += steps
            across = _across(layer)
            how: dict[str, Any] = {"axis": 1} if across == 1 else {"axis": 0, "block_size": spec.granularity.cols}
            zero = [] if spec.symmetric else [f"{name}.zero"]
            nodes += [
                node("DequantizeLinear", [name, f"{name}.scale", *zero], f"{prefix}/weight", **how),
                node("MatMul", [x, f"{prefix}/weight"], last),
            ]
        if product.bias is not None:
            nodes.append(node("Add", [last, product.bias], product.y))
        return nodes


def ordered_inputs(layer: StoredLayer, x: str, prefix: str) -> tuple[list[NodeProto], str]:
    """The inputs in the order of the columns of the codes, where that is their own (act-order)."""
    if not layer.scheme.weight.ordered:
        return [], x
    return [node("Gather", [x, f"{layer.tensor}.order"], f"{prefix}/x_ordered", axis=-1)], f"{prefix}/x_ordered"


def _integer_product(layer: StoredLayer, x: str, y: str, prefix: str) -> list[NodeProto]:
    """y = s_x (sum (q_x - 128) (q_w - 128)) s_w, the sum in int32."""
    steps, codes, scale = dynamic_codes(layer, x, prefix)
    zero = "bitgrain.uint8.128"
    return [
        *steps,
        node("Add", [codes, "bitgrain.128"], f"{prefix}/x_shifted"),
        node("Cast", [f"{prefix}/x_shifted"], f"{prefix}/x_uint8", to=UINT8),
        node("MatMulInteger", [f"{prefix}/x_uint8", layer.tensor, zero, zero], f"{prefix}/sums"),
        node("Cast", [f"{prefix}/sums"], f"{prefix}/sums_float", to=FLOAT),
        node("Mul", [f"{prefix}/sums_float", scale], f"{prefix}/scaled"),
        node("Mul", [f"{prefix}/scaled", f"{layer.tensor}.scale"], y),
    ]


def _is_integer(layer: StoredLayer) -> bool:
    """Whether weight and inputs are multiplied as integers."""
    spec, inputs = layer.scheme.weight, layer.scheme.input
    return (
        inputs is not None
        and inputs.dynamic
        and inputs.format == spec.format == IntFormat(8)
        and inputs.granularity.cols is None
        and spec.symmetric
        and _across(layer) == 1
    )


def _across(layer: StoredLayer) -> int:
    return layer.scheme.weight.granularity.tiles(layer.shape)[1]


def _block(layer: StoredLayer) -> int:
    return layer.scheme.weight.granularity.tile(layer.shape)[1]


def _nbytes(count: int, spec: QuantSpec) -> int:
    """ONNX packs small elements one after the other through the whole tensor."""
    return -(-count * spec.format.bits // 8)


def _flip(format: Format) -> int:
    """What turns a byte of codes + offset into a byte of two's complement."""
    if not (isinstance(format, IntFormat) and format.is_signed):
        return 0
    return 0x88 if format.bits == 4 else 0x80


def _transposed(packed: PackedMatrix, flip: int) -> Tensor:
    """Codes [in, out], packed; `flip` is xored to every byte."""
    (rows, cols), bits, words = packed.shape, packed.spec.format.bits, code_bytes(packed)
    if bits == 8:
        found = words.T.contiguous()
    elif rows % 8 or cols % 8:
        codes = unpack(words.contiguous(), bits, cols).T.contiguous()
        found = pack(codes.reshape(-1), bits, torch.uint8)
    else:
        found = transpose_nibbles(words)
    return found.bitwise_xor_(flip) if flip else found


def _names() -> str:
    return ", ".join(str(format) for format in TYPES)
