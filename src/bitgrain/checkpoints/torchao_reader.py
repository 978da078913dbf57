"""Which layers of a torchao checkpoint are quantized, and how: from the metadata and headers of its files.

Layout: see `checkpoints.torchao`. What metadata say is data: no class is looked up by name, nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.linear_layers import linear_layer
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.safetensors_header import strict_json
from bitgrain.checkpoints.settings import Lenient, parse
from bitgrain.errors import CheckpointError
from bitgrain.numerics import Format, Granularity, IntFormat, QuantSpec, per_channel, per_tensor
from bitgrain.numerics.formats import BF16, FP8_E4M3, FP16, FP32
from bitgrain.recipes import Scheme

_STORAGE = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_READ = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_QDATA = "._weight_qdata"


class _DType(Lenient):
    name: Literal["float32", "float16", "bfloat16"] = Field(alias="_data")


class _IntDType(Lenient):
    name: Literal["int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8"] = Field(alias="_data")


class _Typed(Lenient):
    kind: str = Field(alias="_type")


class _Mapping(Lenient):
    name: str = Field(alias="_data")


class _Inputs(Lenient):
    granularity: _Typed
    mapping_type: _Mapping | None = None


class _Activations(Lenient):
    settings: _Inputs = Field(alias="_data")


class _Weight(Lenient):
    block_size: tuple[int, int] = Field(strict=False)
    dtype: _DType
    target_dtype: _IntDType | None = None
    act_quant_kwargs: _Activations | None = None
    activation_quantization: Literal["int8_asym_per_token"] | None = None


class _Described(Lenient):
    kind: str = Field(alias="_type")
    data: _Weight = Field(alias="_data")


def read_layers(checkpoint: Checkpoint) -> list[StoredLayer]:
    """Every layer with `_weight_qdata` on disk. Raises CheckpointError for what is damaged, missing or unknown."""
    metadata, layers = checkpoint.metadata, []
    for name, entry in checkpoint.entries.items():
        if name.endswith(_QDATA):
            module = name.removesuffix(_QDATA)
            layers.append(_layer(module, _described(module, metadata.get(entry.file, {})), checkpoint))
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json speaks of torchao's weights, and there are none that are read; save it "
            "with torchao 0.18 or newer and safe_serialization"
        )
    return layers


def _described(module: str, metadata: Mapping[str, str]) -> _Described:
    name = f"{module}.weight"
    try:
        given = strict_json(metadata[name].encode())
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name}: its file's metadata do not describe it: {error}") from error
    kind = given.get("_type") if isinstance(given, dict) else None
    if kind not in _READ:
        raise CheckpointError(f"{name} is a {kind} of torchao; {', '.join(_READ)} are read")
    return parse(_Described, given, f"metadata of {name}")


def _layer(module: str, found: _Described, checkpoint: Checkpoint) -> StoredLayer:
    entries, data = checkpoint.entries, found.data
    codes, scale = entries[module + _QDATA], entries.get(f"{module}._weight_scale")
    if len(codes.shape) != 2 or scale is None or scale.dtype not in _STORAGE:
        raise CheckpointError(f"{module}: a matrix of codes and float scales are needed")
    for part in ("act_pre_scale", "act_quant_scale"):
        if f"{module}._weight_{part}" in entries:
            raise CheckpointError(f"{module}: torchao's {part} is not read")
    rows, cols = codes.shape
    down, across = data.block_size
    if down < 1 or across < 1 or rows % down or cols % across:
        raise CheckpointError(f"{module}: blocks of {down} x {across} do not divide {rows} x {cols}")
    tiles = Granularity(None if down == rows else down, None if across == cols else across)
    tiles = per_channel() if (down, across) == (1, cols) else tiles
    weight = QuantSpec(_format(found), tiles, scale=_STORAGE[scale.dtype])
    if isinstance(weight.format, IntFormat):
        zero = f"{module}._weight_zero_point"
        if zero not in entries:
            raise CheckpointError(f"{zero} is missing: the checkpoint is incomplete")
        if bool(checkpoint.read(zero).any().item()):
            weight = QuantSpec(weight.format, tiles, zero_point="integer", scale=weight.scale)
    scheme = Scheme(f"TORCHAO_{found.kind}", weight, _inputs(module, found))
    return linear_layer(module, rows, cols, weight, getattr(torch, data.dtype.name), scheme)


def _format(found: _Described) -> Format:
    if found.kind == "Float8Tensor":
        return FP8_E4M3
    return IntFormat(int(found.data.target_dtype.name.removeprefix("int")) if found.data.target_dtype else 8)


def _inputs(module: str, found: _Described) -> QuantSpec | None:
    if found.data.activation_quantization is not None:
        return QuantSpec(IntFormat(8), per_channel(), zero_point="integer", dynamic=True)
    if found.data.act_quant_kwargs is None:
        return None
    settings: Any = found.data.act_quant_kwargs.settings
    granularity = {"PerRow": per_channel(), "PerTensor": per_tensor()}.get(settings.granularity.kind)
    symmetric = settings.mapping_type is None or settings.mapping_type.name == "SYMMETRIC"
    if granularity is None or not symmetric:
        raise CheckpointError(f"{module}: inputs in {settings.granularity.kind}, or with zero points, are not read")
    if found.kind == "Float8Tensor":
        return QuantSpec(FP8_E4M3, granularity, dynamic=True)
    return QuantSpec(IntFormat(8), granularity, restricted=True, dynamic=True)
