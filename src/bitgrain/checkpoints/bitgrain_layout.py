"""The bitgrain layout: any QuantSpec on any stack of matrices, for what compressed-tensors cannot express.

`quant_method: bitgrain` in config.json; readers that do not know it refuse the checkpoint instead of misreading it.
Tensors of a layer whose original tensor was `T` (E = stacked matrices, absent from the shapes where there is one):

| tensor        | dtype and shape |
|---|---|
| T.codes       | uint8 [E, out, ceil(in * bits / 8)], packed densely, low bits first, as code + offset;
|               | int32 [E, out, in] for formats of more than 8 bits |
| T.scale       | storage dtype [E, tiles down, tiles across]; nested scales: their codes, uint8 |
| T.outer_scale | only for nested scales: the scale of the scales |
| T.outer_zero  | only for asymmetric nested scales |
| T.zero        | only with zero points: codes, or numbers in the storage dtype |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import Read, StoredLayer
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.formats import FloatFormat
from bitgrain.numerics.packing import pack, unpack
from bitgrain.recipes.recipe import SchemeModel


class BitgrainLayout:
    """See `Layout`."""

    name = "bitgrain"

    def refusal(self, layer: StoredLayer) -> str | None:
        if layer.role == "conv":
            return f"{layer.module} is a convolution, which this version cannot store quantized"
        nested = layer.scheme.weight.scale
        if isinstance(nested, QuantSpec) and isinstance(nested.scale, QuantSpec):
            return f"{layer.module}: scales of scales of scales"
        if layer.scheme.weight.scale_format.bits > 8 and isinstance(nested, QuantSpec):
            return f"{layer.module}: nested scales of more than 8 bits"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec = layer.scheme.weight
        stack = (layer.experts,) if layer.experts > 1 else ()
        rows, cols = layer.shape
        tiles = spec.granularity.tiles(layer.shape)
        bits = spec.format.bits
        codes = (torch.uint8, math.ceil(cols * bits / 8)) if bits <= 8 else (torch.int32, cols)
        found = [("codes", codes[0], (rows, codes[1]))]
        if isinstance(spec.scale, QuantSpec):
            inner = spec.scale.granularity.tiles(tiles)
            found += [("scale", torch.uint8, tiles), ("outer_scale", _dtype(spec.scale), inner)]
            if not spec.scale.symmetric:
                found.append(("outer_zero", _zero_dtype(spec.scale), inner))
        else:
            found.append(("scale", _dtype(spec), tiles))
        if not spec.symmetric:
            found.append(("zero", _zero_dtype(spec), tiles))
        return [TensorSpec(f"{layer.tensor}.{suffix}", dtype, (*stack, *shape)) for suffix, dtype, shape in found]

    def encode(self, layer: StoredLayer, parts: Sequence[QTensor]) -> dict[str, Tensor]:
        encoded = [self._encode_one(q) for q in parts]
        join = torch.stack if layer.experts > 1 else (lambda tensors: tensors[0])
        return {f"{layer.tensor}.{suffix}": join([one[suffix] for one in encoded]) for suffix in encoded[0]}

    def _encode_one(self, q: QTensor) -> dict[str, Tensor]:
        format = q.spec.format
        codes = q.codes.to(torch.int32) + format.code_offset
        found = {"codes": pack(codes.to(torch.uint8), format.bits, torch.uint8) if format.bits <= 8 else codes}
        if isinstance(q.scale, QTensor):
            found["scale"] = (q.scale.codes.to(torch.int32) + q.scale.spec.format.code_offset).to(torch.uint8)
            assert isinstance(q.scale.scale, Tensor)
            found["outer_scale"] = q.scale.scale
            if q.scale.zero is not None:
                found["outer_zero"] = q.scale.zero
        else:
            found["scale"] = q.scale
        if q.zero is not None:
            found["zero"] = q.zero
        return {suffix: tensor.contiguous() for suffix, tensor in found.items()}

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        spec = layer.scheme.weight
        stacks = {t.name.removeprefix(f"{layer.tensor}."): read(t.name) for t in self.tensors(layer)}
        if layer.experts == 1:
            return [_decode_one(stacks, spec, layer.in_features)]
        return [
            _decode_one({suffix: tensor[i] for suffix, tensor in stacks.items()}, spec, layer.in_features)
            for i in range(layer.experts)
        ]

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """Each layer by the name of its original tensor, with its scheme spelled out once."""
        schemes: dict[str, int] = {}
        listed: list[dict[str, Any]] = []
        entries: dict[str, dict[str, Any]] = {}
        for layer in layers:
            key = repr(layer.scheme)
            if key not in schemes:
                schemes[key] = len(listed)
                listed.append(SchemeModel.of(layer.scheme).model_dump(mode="json"))
            entries[layer.tensor] = {
                "scheme": schemes[key],
                "shape": list(layer.shape),
                "experts": layer.experts,
                "transposed": layer.transposed,
                "dtype": str(layer.dtype).removeprefix("torch."),
                "module": layer.memory_module,
                "class": layer.class_name,
                "role": layer.role,
            }
        return {
            "quant_method": "bitgrain",
            "version": version("bitgrain"),
            "schemes": listed,
            "layers": entries,
            "ignore": [module for module, _, _ in kept],
        }


def read_layers(config: Mapping[str, Any]) -> list[StoredLayer]:
    """The layers of a `quantization_config` that `BitgrainLayout.config` wrote."""
    schemes = [SchemeModel.model_validate(scheme).build() for scheme in config["schemes"]]
    return [
        StoredLayer(
            tensor=tensor,
            module=tensor.removesuffix(".weight"),
            memory_module=entry["module"],
            class_name=entry["class"],
            role=entry["role"],
            out_features=entry["shape"][0],
            in_features=entry["shape"][1],
            experts=entry["experts"],
            transposed=entry["transposed"],
            dtype=getattr(torch, entry["dtype"]),
            scheme=schemes[entry["scheme"]],
        )
        for tensor, entry in config["layers"].items()
    ]


def _dtype(spec: QuantSpec) -> torch.dtype:
    assert isinstance(spec.scale, FloatFormat)
    dtype = spec.scale.torch_dtype
    assert dtype is not None
    return dtype


def _zero_dtype(spec: QuantSpec) -> torch.dtype:
    if spec.zero_point == "integer":
        return spec.format.code_dtype
    storage = spec.scale_format
    return storage.torch_dtype or torch.float32 if isinstance(storage, FloatFormat) else torch.float32


def _decode_one(stored: Mapping[str, Tensor], spec: QuantSpec, cols: int) -> QTensor:
    format = spec.format
    raw = stored["codes"]
    unsigned = unpack(raw, format.bits, cols).to(torch.int32) if format.bits <= 8 else raw
    codes = (unsigned - format.code_offset).to(format.code_dtype)
    scale: Tensor | QTensor = stored["scale"]
    if isinstance(spec.scale, QuantSpec):
        inner = spec.scale.format
        values = (stored["scale"].to(torch.int32) - inner.code_offset).to(inner.code_dtype)
        scale = QTensor(values, stored["outer_scale"], stored.get("outer_zero"), spec.scale)
    return QTensor(codes, scale, stored.get("zero"), spec)
