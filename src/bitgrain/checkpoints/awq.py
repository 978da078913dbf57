"""The AWQ layout of its GEMM kernels ("version": "gemm"), which vLLM, SGLang and GPTQModel load, and transformers with
GPTQModel.

Tensors of a layer `M` (AutoAWQ's WQLinear_GEMM):

| tensor    | dtype and shape |
|---|---|
| M.qweight | int32 [in, out / 8]: unsigned 4-bit codes of one input, packed along the outputs |
| M.qzeros  | int32 [groups, out / 8]: zero points, packed in the same way |
| M.scales  | float16 [groups, out] |

x = scale * (code - zero). The eight fields of a word, low bits first, hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight.
There is no symmetric form of its own: such layers have zero 8 everywhere, and are read back with zero points. One
group size serves the whole checkpoint. float16 scales are what all readers take; vLLM's kernels also run bfloat16 ones,
which a bfloat16 model keeps. Reading takes float32 too, and auto-round's files packed like this, where a layer may have
groups of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.auto_round import AUTO_ROUND, auto_round_settings, packed_as
from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.linear_layers import check_tensors, kept_dtype, linear_layer, refuse_all_but_weights
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec, per_channel, per_group
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix, float_dtype
from bitgrain.numerics.packing import pack, unpack

INT4 = IntFormat(4)
STORAGES = {torch.float16: FP16, torch.bfloat16: BF16, torch.float32: FP32}
_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of eight in each field of a word, low bits first."""
_MIDDLE = 8
"""The zero point of symmetric layers."""


_PIECE = 1 << 16  # words made at once, so that the steps between stay in a core's cache


class AWQ:
    """See `Layout`."""

    name = "awq"
    summary = "vLLM, SGLang, GPTQModel; integers of 4 bits with zero points"
    keys: tuple[str, ...] = ("quantization_config",)
    storages: tuple[Format, ...] = (FP16, BF16)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        own = section(config)
        return own.get("quant_method") == "awq" or packed_as(own) == self.name

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        own = section(config)
        kind = (
            str(own.get("version") or own.get("format") or "gemm").lower() if own["quant_method"] == "awq" else "gemm"
        )
        if kind != "gemm":
            raise CheckpointError(f"quantization_config: AWQ in version {kind!r}; the version 'gemm' is read")
        dtype = kept_dtype(checkpoint.entries)
        modules = [name.removesuffix(".qweight") for name in checkpoint.entries if name.endswith(".qweight")]
        return [self._read_layer(module, _group_of(module, own), checkpoint, dtype) for module in modules]

    def _read_layer(self, module: str, group: int, checkpoint: Checkpoint, dtype: torch.dtype | None) -> StoredLayer:
        """The layer, with the shapes and dtypes of its tensors checked."""
        words, scales = checkpoint.entries[f"{module}.qweight"].shape, checkpoint.entries.get(f"{module}.scales")
        if scales is None or scales.dtype not in STORAGES:
            raise CheckpointError(f"{module}.scales is missing, or neither float16 nor bfloat16 nor float32")
        if len(words) != 2:
            raise CheckpointError(f"{module}.qweight has shape {list(words)}, which is no matrix")
        tile = per_channel() if group == -1 else per_group(group)
        spec = QuantSpec(INT4, tile, zero_point="integer", scale=STORAGES[scales.dtype])
        layer = linear_layer(module, words[1] * 8, words[0], spec, dtype or scales.dtype)
        if not words[0] or words[0] % tile.tile(layer.shape)[1]:
            raise CheckpointError(f"{module}: groups of {group} do not divide its {words[0]} inputs")
        check_tensors(checkpoint, self.tensors(layer))
        return layer

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        return near_spellings(layer.scheme.weight, (INT4,), self.storages, ("none", "integer"))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, where = layer.scheme.weight, f"for {layer.module}"
        if (reason := refuse_all_but_weights(layer, "AWQ")) is not None:
            return reason
        if spec.format != INT4 or spec.zero_point not in ("none", "integer"):
            return f"AWQ has int4 with or without integer zero points, not {spec.describe()}, {where}"
        if spec.ordered:
            return f"AWQ has no order of the columns (act-order), {where}"
        if spec.granularity.rows != 1:
            return f"AWQ has scales per channel or per group, not {spec.granularity}, {where}"
        if spec.scale not in self.storages:
            return (
                f"AWQ's scales are float16 or bfloat16, not {spec.describe()}, {where}; "
                "`bitgrain quantize --layout awq` chooses such scales from the start"
            )
        if layer.out_features % 8 or layer.in_features % spec.granularity.tile(layer.shape)[1]:
            return f"AWQ has outputs in eights and whole groups: {layer.module} is {layer.shape}, {spec.granularity}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec, (rows, cols) = layer.scheme.weight, layer.shape
        groups = spec.granularity.tiles(layer.shape)[1]
        assert isinstance(spec.scale, Format)
        return [
            TensorSpec(f"{layer.module}.qweight", torch.int32, (cols, rows // 8)),
            TensorSpec(f"{layer.module}.qzeros", torch.int32, (groups, rows // 8)),
            TensorSpec(f"{layer.module}.scales", float_dtype(spec.scale), (groups, rows)),
        ]

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        return self.encode_packed(layer, [PackedMatrix.of(q) for q in parts], inputs)

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        (q,) = parts
        check_inputs(layer, inputs)
        assert isinstance(q.scale, Tensor)
        zero = torch.full(q.scale.shape, _MIDDLE, dtype=torch.uint8)
        if q.zero is not None:
            zero = q.zero.view(torch.uint8) + _MIDDLE
        return {
            f"{layer.module}.qweight": _pack_outputs(unpack(q.words, 4, layer.in_features)),
            f"{layer.module}.qzeros": _pack_outputs(zero),
            f"{layer.module}.scales": q.scale.T.contiguous(),
        }

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        """The codes as they are. (`decode_packed` would pack them along the rows only for them to be unpacked.)"""
        codes = _unpack_outputs(read(f"{layer.module}.qweight"))
        return [QTensor(codes.sub_(_MIDDLE).view(torch.int8), *self._scales(layer, read), layer.scheme.weight)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        words = pack(_unpack_outputs(read(f"{layer.module}.qweight")), 4)
        return [PackedMatrix(words, *self._scales(layer, read), layer.scheme.weight, layer.shape)]

    def _scales(self, layer: StoredLayer, read: Read) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points [out, groups]."""
        scale = read(f"{layer.module}.scales").T.contiguous()
        if layer.scheme.weight.symmetric:
            return scale, None
        return scale, _unpack_outputs(read(f"{layer.module}.qzeros")).sub_(_MIDDLE).view(torch.int8)

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        return []

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """Raises SchemeError for layers with groups of several sizes."""
        groups = {layer.scheme.weight.granularity.cols or -1: layer.module for layer in layers}
        if len(groups) > 1:
            told = ", ".join(f"{group} ({module})" for group, module in groups.items())
            raise SchemeError(f"AWQ has one group size for all layers, not {told}; gptq-v2 has one for each")
        names = list(dict.fromkeys(name for module, memory, _ in kept for name in (module, memory)))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(groups)),
            "zero_point": True,
            "modules_to_not_convert": names or None,
        }


def _group_of(module: str, own: Mapping[str, Any]) -> int:
    """The group size of a layer, -1 for whole rows. Raises CheckpointError unless its codes have 4 bits."""
    settings = auto_round_settings(module, own) if own["quant_method"] == AUTO_ROUND else own
    bits, group = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    if bits != 4:
        raise CheckpointError(f"quantization_config: AWQ with {bits!r} bits; codes of 4 bits are read")
    if type(group) is not int or (group != -1 and group < 1):
        raise CheckpointError(f"quantization_config: group_size {group!r} is neither a number of inputs nor -1")
    return group


def _pack_outputs(codes: Tensor) -> Tensor:
    """Unsigned codes uint8 [out, n] -> int32 words [n, out / 8]."""
    eights = codes.unflatten(0, (-1, 8))
    words = torch.empty(eights.shape[0], codes.shape[1], dtype=torch.int32)
    step = max(1, _PIECE // codes.shape[1])
    for i in range(0, len(eights), step):
        piece, found = eights[i : i + step], words[i : i + step].zero_()
        for field in range(0, 8, 2):
            low, high = _FIELDS[field : field + 2]
            pair = (piece[:, high] << 4).bitwise_or_(piece[:, low]).to(torch.int32)
            found.bitwise_or_(pair.bitwise_left_shift_(4 * field))
    return words.T.contiguous()


def _unpack_outputs(words: Tensor) -> Tensor:
    """The inverse."""
    words = words.T.contiguous()
    codes = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8)
    for field in range(0, 8, 2):
        low, high = _FIELDS[field : field + 2]
        pair = (words >> 4 * field).to(torch.uint8)
        torch.bitwise_and(pair, 15, out=codes[:, low])
        torch.bitwise_right_shift(pair, 4, out=codes[:, high])
    return codes.flatten(0, 1)
