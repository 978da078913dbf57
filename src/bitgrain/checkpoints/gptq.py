"""The GPTQ layouts, v1 and v2, which GPTQModel, vLLM and SGLang load, and transformers with GPTQModel.

Tensors of a layer `M` (GPTQModel's pack, and AutoGPTQ's before it):

| tensor    | dtype and shape |
|---|---|
| M.qweight | int32 [in * bits / 32, out]: a column's codes, densely packed along the inputs, low bits first |
| M.qzeros  | int32 [groups, out * bits / 32]: zero points, packed along the outputs; v1 stores zero - 1 |
| M.scales  | float16 or bfloat16 [groups, out] |
| M.g_idx   | int32 [in]: the group of each input; auto-round's own files do without where inputs are in order |

Codes are unsigned, x = scale * (code - zero), and symmetric layers have zero 2**(bits - 1). 3 bits: 32 codes in three
words, the 11th and the 22nd across two of them, which is the same dense stream of bits. v1 subtracts 1 from each field
(3 bits), or in one subtraction from all the fields of a word (2, 4 and 8 bits): a zero point of 0 then borrows from the
next. That is what GPTQModel and auto-round write, and GPTQModel undoes; readers that add 1 to each field read 2**bits
there, and GPTQModel's own loader takes v1 with zero points from no other program. v2 has none of these troubles.

Scales: float16 is what all readers take. vLLM and SGLang load the scales into the model's dtype, GPTQModel into float16
or bfloat16: a bfloat16 model keeps bfloat16 scales. Reading takes float32 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.auto_round import AUTO_ROUND, packed_as
from bitgrain.checkpoints.gptq_config import BITS, Settings, gptq_config, settings_of
from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.linear_layers import (
    check_tensors,
    in_order,
    kept_dtype,
    linear_layer,
    order_of,
    refuse_all_but_weights,
)
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.errors import CheckpointError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix, float_dtype
from bitgrain.numerics.packing import pack, packed_length, unpack

STORAGES = {torch.float16: FP16, torch.bfloat16: BF16, torch.float32: FP32}
_FORMATS = {"gptq": "gptq", "gptq-v2": "gptq_v2"}


class GPTQ:
    """See `Layout`. version: 1 stores zero points minus one, 2 as they are."""

    keys: tuple[str, ...] = ("quantization_config",)
    storages: tuple[Format, ...] = (FP16, BF16)

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq-v2"
        self.summary = "GPTQModel, vLLM, SGLang; integers of 2, 3, 4, 8 bits, " + (
            "zero points minus one" if version == 1 else "zero points as they are"
        )

    def recognises(self, config: Mapping[str, Any]) -> bool:
        own = section(config)
        if own.get("quant_method") == AUTO_ROUND:
            return packed_as(own) == self.name
        second = own.get("checkpoint_format") == "gptq_v2"
        return own.get("quant_method") == "gptq" and second == (self.version == 2)

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        own = section(config)
        known = own.get("checkpoint_format") or "gptq"
        if own["quant_method"] == "gptq" and known not in _FORMATS.values():
            raise CheckpointError(
                f"checkpoint_format {known!r} is not known; of GPTQ's, {' and '.join(_FORMATS.values())} are"
            )
        dtype = kept_dtype(checkpoint.entries)
        modules = [name.removesuffix(".qweight") for name in checkpoint.entries if name.endswith(".qweight")]
        return [self._read_layer(module, settings_of(module, own), checkpoint, dtype) for module in modules]

    def _read_layer(
        self, module: str, settings: Settings, checkpoint: Checkpoint, dtype: torch.dtype | None
    ) -> StoredLayer:
        """The layer, with the shapes and dtypes of its tensors checked, and its g_idx unless that orders the inputs."""
        entries = checkpoint.entries
        words, scales = entries[f"{module}.qweight"].shape, entries.get(f"{module}.scales")
        if scales is None or scales.dtype not in STORAGES:
            raise CheckpointError(f"{module}.scales is missing, or neither float16 nor bfloat16 nor float32")
        if len(words) != 2:
            raise CheckpointError(f"{module}.qweight has shape {list(words)}, which is no matrix")
        order = entries.get(f"{module}.g_idx")
        cols = order.shape[0] if order is not None and len(order.shape) == 1 else words[0] * 32 // settings.bits
        plain = replace(settings, ordered=False)
        layer = linear_layer(module, words[1], cols, plain.spec(STORAGES[scales.dtype]), dtype or scales.dtype)
        if not cols or cols % layer.scheme.weight.granularity.tile(layer.shape)[1]:
            raise CheckpointError(f"{module}: groups of {settings.group} do not divide its {cols} inputs")
        check_tensors(checkpoint, self.tensors(layer))
        if order is None or _is_plain(checkpoint.read(f"{module}.g_idx"), layer):
            return layer  # also one in act-order whose groups are static
        if not settings.ordered or settings.group == -1:
            raise CheckpointError(
                f"{module}.g_idx orders the inputs, but config.json says they are in order, so readers disagree"
            )
        ordered = replace(layer.scheme.weight, ordered=True)
        return replace(layer, scheme=replace(layer.scheme, weight=ordered))

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        formats = [IntFormat(bits) for bits in BITS]
        return near_spellings(layer.scheme.weight, formats, self.storages, ("none", "integer"))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, where = layer.scheme.weight, f"for {layer.module}"
        if (reason := refuse_all_but_weights(layer, "GPTQ")) is not None:
            return reason
        if not (isinstance(spec.format, IntFormat) and spec.format.signed and spec.format.bits in BITS):
            return f"GPTQ has integers of 2, 3, 4 and 8 bits, not {spec.describe()}, {where}"
        if spec.zero_point not in ("none", "integer"):
            return f"GPTQ has zero points that are codes, not {spec.describe()}, {where}"
        if spec.granularity.rows != 1:
            return f"GPTQ has scales per channel or per group, not {spec.granularity}, {where}"
        if spec.scale not in self.storages:
            return (
                f"GPTQ's scales are float16 or bfloat16, not {spec.describe()}, {where}; "
                f"`bitgrain quantize --layout {self.name}` chooses such scales from the start"
            )
        bits = spec.format.bits
        if layer.in_features % 32 or layer.out_features * bits % 32:
            return f"GPTQ packs whole words: {layer.module} is {layer.shape}, codes of {bits} bits do not fill them"
        if layer.in_features % _group(layer):
            return f"{spec.granularity} does not divide the {layer.in_features} inputs of {layer.module}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec, (rows, cols) = layer.scheme.weight, layer.shape
        bits, groups = spec.format.bits, spec.granularity.tiles(layer.shape)[1]
        assert isinstance(spec.scale, Format)
        return [
            TensorSpec(f"{layer.module}.qweight", torch.int32, (packed_length(cols, bits), rows)),
            TensorSpec(f"{layer.module}.qzeros", torch.int32, (groups, packed_length(rows, bits))),
            TensorSpec(f"{layer.module}.scales", float_dtype(spec.scale), (groups, rows)),
            TensorSpec(f"{layer.module}.g_idx", torch.int32, (cols,), optional=not spec.ordered),
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
        spec = layer.scheme.weight
        bits, (rows, cols) = spec.format.bits, layer.shape
        assert isinstance(q.scale, Tensor)
        g_idx = torch.arange(cols, dtype=torch.int32) // _group(layer)
        words = q.words_as(torch.int32)
        if q.order is not None:
            places = torch.argsort(q.order)
            words, g_idx = in_order(words, places, bits), g_idx.index_select(0, places)
        if q.zero is None:
            zero = torch.full((q.scale.shape[1], rows), 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zero = (q.zero.view(torch.uint8) + 2 ** (bits - 1)).T.contiguous()
        found = {
            "qweight": words.T,
            "qzeros": self._store_zeros(zero, bits),
            "scales": q.scale.T,
            "g_idx": g_idx,
        }
        return {f"{layer.module}.{suffix}": tensor.contiguous() for suffix, tensor in found.items()}

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec, bits = layer.scheme.weight, layer.scheme.weight.format.bits
        words = read(f"{layer.module}.qweight").T.contiguous()
        stored = read(f"{layer.module}.qzeros")
        zeros = unpack(self._plain_zeros(stored, bits), bits, layer.out_features)
        zero = None
        if not spec.symmetric:
            zero = (zeros.T.contiguous() - 2 ** (bits - 1)).view(torch.int8)
        elif bool((zeros != 2 ** (bits - 1)).any().item()):
            raise CheckpointError(
                f"{layer.module}.qzeros: config.json says sym, but there are zero points other than {2 ** (bits - 1)}; "
                "if they are meant, say sym: false there"
            )
        order = None
        if spec.ordered:
            order = order_of(read(f"{layer.module}.g_idx"), _group(layer), f"{layer.module}.g_idx")
            words = in_order(words, order, bits)
        scale = read(f"{layer.module}.scales").T.contiguous()
        return [PackedMatrix(words, scale, zero, spec, layer.shape, order=order)]

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        return []

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """The commonest settings for all, `dynamic` for layers with others, and for linears that are kept."""
        return gptq_config(layers, kept, _FORMATS[self.name])

    def _store_zeros(self, zero: Tensor, bits: int) -> Tensor:
        """uint8 [groups, out] packed as the version has them."""
        if self.version == 2:
            return pack(zero, bits)
        if bits == 3:
            return pack((zero - 1) & 7, bits)
        return pack(zero, bits) - _ones(bits)

    def _plain_zeros(self, stored: Tensor, bits: int) -> Tensor:
        """The inverse, still packed."""
        if self.version == 2:
            return stored
        if bits == 3:
            count = stored.shape[1] * 32 // 3
            return pack((unpack(stored, bits, count) + 1) & 7, bits)
        return stored + _ones(bits)


def _is_plain(g_idx: Tensor, layer: StoredLayer) -> bool:
    """Whether the inputs are in groups one after the other."""
    return torch.equal(g_idx, torch.arange(layer.in_features, dtype=torch.int32) // _group(layer))


def _group(layer: StoredLayer) -> int:
    return layer.scheme.weight.granularity.tile(layer.shape)[1]


def _ones(bits: int) -> int:
    """A 1 in each field of `bits` bits of a word."""
    return sum(1 << shift for shift in range(0, 32, bits))
