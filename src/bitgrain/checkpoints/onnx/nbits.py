"""onnx-nbits: onnxruntime's product com.microsoft.MatMulNBits (its ContribOperators.md), for weights of 2, 4 or 8 bits.

    B            uint8 [out, ceil(in / block), block * bits / 8]: unsigned codes, the low bits first
    scales       float32 [out * ceil(in / block)]
    zero_points  uint8 [out * ceil(ceil(in / block) * bits / 8)], packed along each row; without them 2 ** (bits - 1)

accuracy_level 1 keeps the inputs in float32, which is exact to the scheme; onnxruntime's 4 would round them to int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.onnx.activations import node
from bitgrain.checkpoints.onnx.form import (
    FLOAT,
    INT32,
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
from bitgrain.checkpoints.onnx.qdq import ordered_inputs
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.numerics import IntFormat, QuantSpec, per_group
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.packing import pack

if TYPE_CHECKING:
    from onnx import NodeProto

DOMAIN = "com.microsoft"
BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)
FLOAT_INPUTS = 1
"""accuracy_level: inputs stay float32."""


class NBits:
    """See `Form`."""

    name = "onnx-nbits"
    summary = "onnxruntime; 2, 4 or 8 bits in groups of 16 to 256, inputs as they are"
    domains: Mapping[str, int] = {DOMAIN: 1}

    def refusal(self, layer: StoredLayer) -> str | None:
        spec = layer.scheme.weight
        if (found := common_refusal(layer)) is not None:
            return found
        if layer.scheme.input is not None:
            return f"{layer.module}: MatMulNBits takes inputs as they are; onnx-qdq can quantize them"
        if not isinstance(spec.format, IntFormat) or spec.format.bits not in BITS:
            return f"{layer.module}: MatMulNBits has integers of 2, 4 and 8 bits, no {spec.format}"
        if spec.symmetric and not spec.format.signed:
            return f"{layer.module}: without zero points, codes of MatMulNBits are signed, not {spec.format}"
        if _block(layer) is None:
            return f"{layer.module}: MatMulNBits has blocks of {BLOCKS[-1]} to {BLOCKS[0]}, no {spec.granularity}"
        return None

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        spec = layer.scheme.weight
        formats = tuple(IntFormat(bits, signed) for bits in BITS for signed in (True, False))
        return near_spellings(
            spec, formats, [spec.scale, FP32, FP16, BF16], ("none", "integer"), [per_group(b) for b in BLOCKS]
        )

    def initializers(self, layer: StoredLayer) -> list[Initializer]:
        spec, name = layer.scheme.weight, layer.tensor
        (rows, cols), bits, block = layer.shape, spec.format.bits, _size(layer)
        across = -(-cols // block)
        found = [
            Initializer(name, UINT8, (rows, across, block * bits // 8), rows * across * block * bits // 8),
            Initializer(f"{name}.scale", FLOAT, (rows * across,), 4 * rows * across),
        ]
        if not spec.symmetric:
            row = -(-across * bits // 8)
            found.append(Initializer(f"{name}.zero", UINT8, (rows * row,), rows * row))
        if spec.ordered:
            found.append(Initializer(f"{name}.order", INT32, (cols,), 4 * cols))
        return found

    def encode(self, layer: StoredLayer, packed: PackedMatrix, inputs: Sequence[StaticInput]) -> dict[str, Tensor]:
        spec, name = layer.scheme.weight, layer.tensor
        bits, block = spec.format.bits, _size(layer)
        across = -(-layer.in_features // block)
        words = code_bytes(packed)
        missing = across * block * bits // 8 - words.shape[1]
        found = {
            name: as_bytes(F.pad(words, (0, missing)) if missing else words),
            f"{name}.scale": as_bytes(block_scales(packed.scale, layer, block)),
        }
        if packed.zero is not None:
            zeros = block_zeros(packed.zero, layer, block) + spec.format.code_offset
            found[f"{name}.zero"] = as_bytes(pack(zeros.to(torch.uint8), bits, torch.uint8))
        if packed.order is not None:
            found[f"{name}.order"] = as_bytes(packed.order)
        return found

    def inline(self, layer: StoredLayer) -> dict[str, Constant]:
        return {}

    def nodes(self, layer: StoredLayer, product: Product) -> list[NodeProto]:
        spec, name = layer.scheme.weight, layer.tensor
        nodes, x = ordered_inputs(layer, product.x, product.y)
        last = product.y if product.bias is None else f"{product.y}/product"
        zero = [] if spec.symmetric else [f"{name}.zero"]
        nodes.append(
            node(
                "MatMulNBits",
                [x, name, f"{name}.scale", *zero],
                last,
                DOMAIN,
                K=layer.in_features,
                N=layer.out_features,
                bits=spec.format.bits,
                block_size=_size(layer),
                accuracy_level=FLOAT_INPUTS,
            )
        )
        if product.bias is not None:
            nodes.append(node("Add", [last, product.bias], product.y))
        return nodes


def _block(layer: StoredLayer) -> int | None:
    """The largest block that the tiles are made of; None where there is none."""
    cols = layer.scheme.weight.granularity.cols
    if cols is None or cols >= layer.in_features:
        return next((block for block in BLOCKS[1:] if layer.in_features % block == 0), BLOCKS[-1])
    return next((block for block in BLOCKS if cols % block == 0), None)


def _size(layer: StoredLayer) -> int:
    block = _block(layer)
    assert block is not None
    return block
