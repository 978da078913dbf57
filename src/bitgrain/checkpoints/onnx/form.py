"""What each way to say a quantized linear layer in ONNX answers (`qdq`, `nbits`), and what they share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.qtensor import scale_values

if TYPE_CHECKING:
    from onnx import NodeProto

FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 7, 10, 16
FLOAT8E4M3FN, FLOAT8E5M2, UINT4, INT4 = 17, 19, 21, 22
"""Codes of onnx.TensorProto.DataType, so that nothing needs the package to be named."""


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph: an ONNX data type, its shape, and the bytes that it takes."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    nbytes: int


Constant = tuple[int, tuple[int, ...], list[float]]
"""A small constant: ONNX data type, shape, numbers."""


@dataclass(frozen=True)
class Product:
    """One use of a weight W [out, in]: y = x W^T + bias, x of any rank, by the names of the values."""

    x: str
    y: str
    bias: str | None


class Form(Protocol):
    """A way to say a quantized linear layer in an ONNX graph."""

    name: str
    summary: str
    domains: Mapping[str, int]

    def refusal(self, layer: StoredLayer) -> str | None:
        """Why `layer` cannot be said so, or None."""
        ...

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        """As `Layout.spellings`."""
        ...

    def initializers(self, layer: StoredLayer) -> list[Initializer]:
        """The constants that `layer` takes."""
        ...

    def encode(self, layer: StoredLayer, packed: PackedMatrix, inputs: Sequence[StaticInput]) -> dict[str, Tensor]:
        """Their bytes, by name."""
        ...

    def inline(self, layer: StoredLayer) -> dict[str, Constant]:
        """Small constants that lie in the graph itself, which layers may share, by name."""
        ...

    def nodes(self, layer: StoredLayer, product: Product) -> list[NodeProto]:
        """The nodes that compute `product`, in order."""
        ...


def need_onnx() -> None:
    """SchemeError with the remedy unless the packages for ONNX are here."""
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise SchemeError(f"ONNX needs the package {package}, which is not installed: pip install 'bitgrain[onnx]'")


def common_refusal(layer: StoredLayer) -> str | None:
    """What no form holds."""
    spec = layer.scheme.weight
    if layer.role not in ("linear", "lm_head"):
        return f"{layer.module} is a quantized {layer.role}; only linear layers have an exact form in ONNX"
    if layer.experts > 1 or layer.original:
        return f"{layer.module}: stacked matrices are no linear layer"
    if spec.outliers or spec.columns:
        return f"{layer.module}: ONNX has no place for {'outliers' if spec.outliers else 'columns in 16 bits'}"
    if spec.zero_point == "real":
        return f"{layer.module}: zero points of ONNX are codes, not any number; solve it with integer zero points"
    if spec.zero_point == "minimum":
        return f"{layer.module}: ONNX has no place for minima"
    if spec.granularity.cols == 1:
        return f"{layer.module}: {spec.granularity} scales input channels, which no engine multiplies in low bits"
    if layer.scheme.output is not None:
        return f"{layer.module}: quantized outputs"
    return None


def block_scales(stored: Tensor | QTensor, layer: StoredLayer, block: int) -> Tensor:
    """Scales as float32 [out, ceil(in / block)]: tiles of several rows, or wider than a block, repeat theirs."""
    return _spread(scale_values(stored), layer, block)


def block_zeros(zero: Tensor, layer: StoredLayer, block: int) -> Tensor:
    """Zero points likewise, as numbers of the format, in int32."""
    return _spread(zero.to(torch.int32), layer, block)


def _spread(tiles: Tensor, layer: StoredLayer, block: int) -> Tensor:
    rows, cols = layer.shape
    tile_rows, tile_cols = layer.scheme.weight.granularity.tile(layer.shape)
    across = -(-cols // block)
    tiles = tiles.repeat_interleave(tile_rows, dim=0)[:rows] if tile_rows > 1 else tiles
    if tiles.shape[1] == across:
        return tiles
    return tiles.repeat_interleave(-(-tile_cols // block), dim=1)[:, :across]


def code_bytes(packed: PackedMatrix) -> Tensor:
    """Unsigned codes uint8 [out, ceil(in * bits / 8)], whatever words they were read in."""
    return packed.words_as(torch.uint8)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: uint8, flat."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
