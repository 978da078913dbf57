"""The layout of torchao in safetensors, as transformers saves it: read, not written.

Tensors of a layer `M` [out, in] (torchao 0.18, `prototype.safetensors`; transformers 5.23), beside which the file's
metadata describe M.weight in JSON:

| class                    | tensors |
|---|---|
| Int8Tensor               | M._weight_qdata int8 [out, in], M._weight_scale, M._weight_zero_point int8 |
| IntxUnpackedToInt8Tensor | the same, with codes of 1 to 8 bits |
| Float8Tensor             | M._weight_qdata float8_e4m3fn [out, in], M._weight_scale |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import Read, StoredLayer
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.torchao_reader import read_layers
from bitgrain.errors import SchemeError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix, scale_dtype

READ_ONLY = "torchao's layout is read, not written; convert to compressed-tensors, which transformers and vLLM load"


class TorchAO:
    """See `Layout`."""

    name = "torchao"
    summary = "transformers with torchao: int8, int1 to int7 unpacked and FP8; read only"
    keys: tuple[str, ...] = ("quantization_config",)
    storages: tuple[Format, ...] = ()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return section(config).get("quant_method") == self.name

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_layers(checkpoint)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        return (layer.scheme.weight,)

    def refusal(self, layer: StoredLayer) -> str | None:
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec = layer.scheme.weight
        tiles, integer = spec.granularity.tiles(layer.shape), isinstance(spec.format, IntFormat)
        found = [
            TensorSpec(_name(layer, "qdata"), torch.int8 if integer else torch.float8_e4m3fn, layer.shape),
            TensorSpec(_name(layer, "scale"), scale_dtype(spec), tiles),
        ]
        return [*found, TensorSpec(_name(layer, "zero_point"), torch.int8, tiles)] if integer else found

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        raise SchemeError(READ_ONLY)

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        spec = layer.scheme.weight
        tiles = spec.granularity.tiles(layer.shape)
        codes, zero = read(_name(layer, "qdata")), None
        if not isinstance(spec.format, IntFormat):
            codes = codes.view(torch.uint8)
        if not spec.symmetric:
            zero = read(_name(layer, "zero_point")).reshape(tiles)
        return [QTensor(codes, read(_name(layer, "scale")).reshape(tiles), zero, spec)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        return [PackedMatrix.of(q) for q in self.decode(layer, read)]

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        return []

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        raise SchemeError(READ_ONLY)


def _name(layer: StoredLayer, part: str) -> str:
    return f"{layer.module}._weight_{part}"
