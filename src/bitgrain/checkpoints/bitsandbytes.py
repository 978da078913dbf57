"""The layouts of bitsandbytes, which transformers saves and loads: NF4 and FP4 in blocks, and int8 rows of LLM.int8().

Tensors of a layer `M` [out, in] (bitsandbytes 0.50, `QuantState.as_dict` and `Linear8bitLt`; transformers 5.23):

| tensor                        | dtype and shape |
|---|---|
| M.weight                      | uint8 [out * in / 2, 1]: two codes in a byte, the first in the high nibble |
| M.weight.absmax               | float32 [out * in / block]; double quantized: uint8, indices into the nested map |
| M.weight.quant_map            | float32 [16]: what each code means |
| M.weight.nested_absmax        | double quantized: float32, one for each 256 of absmax, over the ends of rows |
| M.weight.nested_quant_map     | double quantized: float32 [256] |
| M.weight.quant_state.bitsandbytes__nf4 | uint8: JSON of block, shape, dtype and the mean of absmax |
| M.weight, M.SCB, M.weight_format | LLM.int8(): int8 [out, in], float32 [out] (127 times the scale), uint8: 0 |

A weight is code * absmax in float32, absmax = map[index] * nested_absmax + mean, product before sum.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitgrain.checkpoints.bitsandbytes_reader import BLOCKS, FP4, NAMES, NF4, SCB, read_4bit, read_int8, settings_of
from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.errors import SchemeError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec, per_channel, per_token
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix, float_dtype
from bitgrain.numerics.spec import bnb_4bit

_OFFSET_CHARACTERS = 24  # of any float32 in JSON; what is left of them are spaces, so that sizes are known beforehand


class _Bitsandbytes:
    """What the three have in common."""

    keys: tuple[str, ...] = ("quantization_config",)

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        return []

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def _misplaced(self, layer: StoredLayer) -> str | None:
        """Why bitsandbytes has no such layer, whatever its scheme, or None."""
        spec = layer.scheme.weight
        if layer.role not in ("linear", "expert", "lm_head", "router"):
            return f"bitsandbytes holds linear layers, {layer.module} is {layer.class_name}"
        if layer.transposed:
            return f"{layer.module} is stored as [in, out] ({layer.class_name}), which is not written for bitsandbytes"
        if layer.experts > 1:
            return f"{layer.module} stacks {layer.experts} experts in one tensor; bitsandbytes holds matrices"
        if spec.outliers or spec.columns or spec.ordered or not spec.symmetric:
            return f"bitsandbytes has no place for the parts of {spec.describe()}, for {layer.module}"
        return None


class Bitsandbytes4Bit(_Bitsandbytes):
    """See `Layout`."""

    storages: tuple[Format, ...] = (FP32,)

    def __init__(self, name: str, format: Format, summary: str) -> None:
        self.name, self.format, self.summary = name, format, summary

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return settings_of(config) == NAMES[self.format]

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_4bit(checkpoint)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        doubled = bnb_4bit(self.format.name).scale
        return near_spellings(layer.scheme.weight, (self.format,), (doubled, FP32), ("none",))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, where = layer.scheme.weight, f"for {layer.module}"
        if (reason := self._misplaced(layer)) is not None:
            return reason
        if layer.scheme.input is not None or layer.scheme.output is not None:
            return f"bitsandbytes multiplies 4-bit weights by inputs as they are, {where}; choose a weight-only scheme"
        if spec.format != self.format:
            return f"{self.name} holds {self.format}, not {spec.format}, {where}"
        block = spec.granularity.cols
        if spec.granularity.rows != 1 or block not in BLOCKS:
            return f"{self.name} has blocks of {', '.join(map(str, BLOCKS))} weights, not {spec.granularity}, {where}"
        if layer.in_features % block:
            return f"blocks of {block} would go over the ends of the rows of {layer.in_features} of {layer.module}"
        if spec.scale != FP32 and not _is_double(spec.scale):
            return f"{self.name} has no place for the scales of {spec.describe()}, {where}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec = layer.scheme.weight
        down, across = spec.granularity.tiles(layer.shape)
        found: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("", torch.uint8, (layer.elements // 2, 1)),
            (".absmax", torch.float32, (down * across,)),
            (".quant_map", torch.float32, (16,)),
        ]
        if isinstance(spec.scale, QuantSpec):
            runs = spec.scale.granularity.tiles((down, across))[1]
            found[1] = (".absmax", torch.uint8, (down * across,))
            found += [(".nested_absmax", torch.float32, (runs,)), (".nested_quant_map", torch.float32, (256,))]
        name = f"{layer.module}.weight"
        state = TensorSpec(name + _state_name(spec), torch.uint8, (len(_state(layer, 0.0)),), any_size=True)
        return [*(TensorSpec(name + suffix, dtype, shape) for suffix, dtype, shape in found), state]

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        return self.encode_packed(layer, [PackedMatrix.of(q) for q in parts], inputs)

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        check_inputs(layer, inputs)
        (q,) = parts
        spec, scale, offset = layer.scheme.weight, q.scale, 0.0
        found = {"": _swap(q.words_as(torch.uint8).reshape(-1), _TO_BYTES.get(spec.format)).view(-1, 1)}
        if isinstance(scale, QTensor):
            assert isinstance(scale.scale, Tensor)
            assert isinstance(scale.minimum, Tensor)
            offset = -float(scale.minimum.flatten()[0])
            if bool((scale.minimum != -offset).any().item()):
                raise SchemeError(f"{layer.module}: bitsandbytes keeps one mean of all scales, these have several")
            found[".absmax"] = scale.codes.reshape(-1)
            found[".nested_absmax"] = scale.scale.reshape(-1)
            found[".nested_quant_map"] = scale.spec.format.grid()
        else:
            found[".absmax"] = scale.reshape(-1)
        found[".quant_map"] = _table(spec.format)
        found[_state_name(spec)] = torch.frombuffer(bytearray(_state(layer, offset)), dtype=torch.uint8)
        return {f"{layer.module}.weight{suffix}": tensor.contiguous() for suffix, tensor in found.items()}

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec, name = layer.scheme.weight, f"{layer.module}.weight"
        tiles = spec.granularity.tiles(layer.shape)
        stored = read(name).reshape(-1).view(torch.uint8)
        words = _swap(stored, _FROM_BYTES.get(spec.format)).view(layer.out_features, -1)
        scale: Tensor | QTensor = read(f"{name}.absmax").view(tiles)
        if isinstance(spec.scale, QuantSpec):
            outer = read(f"{name}.nested_absmax").view(1, -1)
            state = json.loads(bytes(read(name + _state_name(spec)).tolist()))
            minimum = -torch.full_like(outer, state["nested_offset"])
            scale = QTensor(scale, outer, None, spec.scale, minimum=minimum)
        return [PackedMatrix(words, scale, None, spec, layer.shape)]

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        double = any(isinstance(layer.scheme.weight.scale, QuantSpec) for layer in layers)
        dtype = str(layers[0].dtype).removeprefix("torch.")
        return _config(kept, bits=4, dtype=dtype, type=NAMES[self.format], double=double, threshold=6.0)


class BitsandbytesInt8(_Bitsandbytes):
    """See `Layout`. Scales of 16 bits are written: times 127 and divided by 127 again, they are the same in float32.
    Other writers' are read as SCB times 1/127, which is what bitsandbytes makes of them."""

    name = "bnb-int8"
    summary = "transformers with bitsandbytes: LLM.int8()"
    storages: tuple[Format, ...] = (FP16, BF16)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return settings_of(config) == "int8"

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_int8(section(config), checkpoint)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        return near_spellings(layer.scheme.weight, (IntFormat(8),), self.storages, ("none",), (per_channel(),))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, inputs, where = layer.scheme.weight, layer.scheme.input, f"for {layer.module}"
        if (reason := self._misplaced(layer)) is not None:
            return reason
        if spec.format != IntFormat(8) or spec.granularity != per_channel():
            return f"bnb-int8 holds int8 with a scale for each row, not {spec.describe()}, {where}"
        token = inputs is not None and inputs.dynamic and inputs.symmetric and inputs.restricted
        if inputs is None or not token or (inputs.format, inputs.granularity) != (IntFormat(8), per_token()):
            return f"bitsandbytes quantizes the inputs of int8 layers per token, {where}; choose LLM_INT8 or W8A8"
        if spec.scale != SCB and spec.scale not in self.storages:
            return f"bnb-int8 keeps 127 times the scale, which is exact for scales of 16 bits only, {where}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        return [
            TensorSpec(f"{layer.module}.weight", torch.int8, layer.shape),
            TensorSpec(f"{layer.module}.SCB", torch.float32, (layer.out_features,)),
            TensorSpec(f"{layer.module}.weight_format", torch.uint8, ()),
        ]

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        check_inputs(layer, inputs)
        (q,) = parts
        scale = q.scale.scale if isinstance(q.scale, QTensor) else q.scale.float() * 127
        assert isinstance(scale, Tensor)
        return {
            f"{layer.module}.weight": q.codes.contiguous(),
            f"{layer.module}.SCB": scale.reshape(-1).clone(),
            f"{layer.module}.weight_format": torch.zeros((), dtype=torch.uint8),
        }

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec = layer.scheme.weight
        stored = read(f"{layer.module}.SCB").view(-1, 1)
        scale: Tensor | QTensor
        if isinstance(spec.scale, QuantSpec):
            scale = QTensor(torch.ones(stored.shape, dtype=torch.uint8), stored, None, spec.scale)
        else:
            scale = (stored / 127).to(float_dtype(spec.scale))
        words = read(f"{layer.module}.weight").view(torch.uint8) + spec.format.code_offset
        return [PackedMatrix(words, scale, None, spec, layer.shape)]

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        thresholds = {layer.scheme.input.threshold for layer in layers if layer.scheme.input is not None}
        if len(thresholds) > 1:
            raise SchemeError(f"bitsandbytes has one threshold for all layers, not {sorted(thresholds)}")
        return _config(kept, bits=8, dtype="float32", type="fp4", double=False, threshold=thresholds.pop())


def _config(
    kept: Sequence[tuple[str, str, str]], *, bits: int, dtype: str, type: str, double: bool, threshold: float
) -> dict[str, Any]:
    """A BitsAndBytesConfig."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": type,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dict.fromkeys(name for module, memory, _ in kept for name in (module, memory))),
        "llm_int8_threshold": threshold,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
    }


def _is_double(scale: Format | QuantSpec) -> bool:
    if not isinstance(scale, QuantSpec) or scale.granularity.run is None:
        return False
    return scale.format.bits == 8 and len(scale.format.grid()) == 256 and (scale.scale, scale.minimum) == (FP32, FP32)


def _state_name(spec: QuantSpec) -> str:
    return f".quant_state.bitsandbytes__{NAMES[spec.format]}"


def _state(layer: StoredLayer, offset: float) -> bytes:
    """The JSON of `QuantState`, of a length that does not depend on `offset`."""
    spec = layer.scheme.weight
    state: dict[str, Any] = {
        "quant_type": NAMES[spec.format],
        "blocksize": spec.granularity.cols,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": list(layer.shape),
    }
    if not isinstance(spec.scale, QuantSpec):
        return json.dumps(state).encode()
    state |= {"nested_blocksize": spec.scale.granularity.run, "nested_dtype": "float32", "nested_offset": 0}
    length = len(json.dumps(state)) + _OFFSET_CHARACTERS
    return json.dumps(state | {"nested_offset": offset}).encode().ljust(length)


def _codes(format: Format) -> list[int]:
    """bitsandbytes' code of each of ours. Those of its FP4 are a sign and a place in an order of its own."""
    if format == NF4:
        return list(range(16))
    positive = [1, 6, 7, 4, 5, 2, 3]
    return [8 + code for code in reversed(positive)] + [0, *positive]


def _table(format: Format) -> Tensor:
    """float32 [16]: the number of each of bitsandbytes' codes; its FP4 has a second 0."""
    table = torch.zeros(16)
    table[torch.tensor(_codes(format))] = format.grid()
    return table


def _bytes(image: Sequence[int]) -> NDArray[np.uint16]:
    """[65536]: for each two bytes of two codes those of their images, first and second code in each other's place."""
    byte, images = np.arange(256), np.array(image, dtype=np.uint8)
    one = (images[byte & 15] << 4 | images[byte >> 4]).astype(np.uint16)
    return (one[:, None] << 8 | one).reshape(-1).astype(np.uint16)


def _from_codes(format: Format) -> list[int]:
    """Our code of each of bitsandbytes'; its second 0 is ours too."""
    codes = _codes(format)
    return [codes.index(code if code in codes else 0) for code in range(16)]


_TO_BYTES = {FP4: _bytes([*_codes(FP4), 0])}  # 15 is no code of ours
_FROM_BYTES = {FP4: _bytes(_from_codes(FP4))}


def _swap(stored: Tensor, table: NDArray[np.uint16] | None) -> Tensor:
    """Bytes as `table` has them, or with nothing but their nibbles swapped; their number is even, as blocks are."""
    if table is None:
        return (stored << 4).bitwise_or_(stored >> 4)
    return torch.from_numpy(table[stored.contiguous().numpy().view(np.uint16)].view(np.uint8))
