"""The compressed-tensors layout, which vLLM, SGLang and transformers load as it is.

Tensors of a layer `M` (library compressed-tensors 0.20, its compressors and QuantizationConfig):

| format                 | tensors |
|---|---|
| pack-quantized         | M.weight_packed int32 [out, ceil(in * bits / 32)], M.weight_scale, M.weight_shape int64 [2] |
|                        | asymmetric: M.weight_zero_point int32, packed along the rows; |
|                        | act-order (read only, the library gave it up in 0.20): M.weight_g_idx int32 [in] |
| int-, float-quantized  | M.weight int8 / float8_e4m3fn [out, in], M.weight_scale |
| nvfp4-pack-quantized   | M.weight_packed uint8 [out, in / 2], M.weight_scale float8_e4m3fn, |
|                        | M.weight_global_scale float32 [1] (the inverse of the shared scale), M.input_global_scale |
| mxfp4-pack-quantized   | M.weight_packed uint8 [out, in / 2], M.weight_scale uint8 (E8M0) |
| static int8, FP8 inputs | M.input_scale [1] beside each of the above; asymmetric: M.input_zero_point int8 [1] |

Codes are packed densely, low bits first, as code + 2**(bits - 1). Readers decode to the dtype of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.compressed_tensors_reader import read_layers
from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.linear_layers import in_order, order_of
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.settings import section
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.errors import CheckpointError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec
from bitgrain.numerics.formats import BF16, FP4_E2M1, FP8_E4M3, FP16, FP32, FloatFormat
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.packing import pack, unpack
from bitgrain.numerics.spec import mxfp4, nvfp4
from bitgrain.recipes.scheme import NVFP4_INPUT_OUTER_SCALE, Scheme

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
INTEGERS = tuple(IntFormat(bits) for bits in range(2, 9))


class CompressedTensors:
    """See `Layout`."""

    name = "compressed-tensors"
    summary = "vLLM, SGLang and transformers; integers of 2 to 8 bits, FP8, NVFP4, MXFP4, quantized inputs"
    keys: tuple[str, ...] = ("quantization_config",)
    storages: tuple[Format, ...] = ()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return section(config).get("quant_method") == self.name

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_layers(config["quantization_config"], checkpoint)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        own = {torch.float16: FP16, torch.bfloat16: BF16}.get(layer.dtype, FP32)  # readers decode to the scale's dtype
        return near_spellings(layer.scheme.weight.with_scale_dtype(own), INTEGERS, (own,), ("none", "integer"))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, strategy, where = layer.scheme.weight, layer.scheme.weight.granularity.kind, f"for {layer.module}"
        if layer.role not in ("linear", "expert", "lm_head", "router"):
            return f"compressed-tensors holds linear layers, {layer.module} is {layer.class_name}"
        if layer.transposed:
            return f"{layer.module} is stored as [in, out] ({layer.class_name}), which compressed-tensors does not know"
        if layer.experts > 1:
            return f"{layer.module} stacks {layer.experts} experts in one tensor; compressed-tensors holds matrices"
        if spec.outliers:
            return f"compressed-tensors has no place for the outliers of {spec.describe()}, {where}"
        if spec.columns:
            return f"compressed-tensors has no place for columns in 16 bits of {spec.describe()}, {where}"
        if spec.ordered:
            return f"compressed-tensors 0.20 has given up act-order with groups, {where}; gptq has it"
        if _format(layer.scheme) is None:
            return f"compressed-tensors has no format for weights {spec.describe()}, {where}"
        if strategy is None:
            return f"compressed-tensors has no granularity {spec.granularity}, {where}"
        if layer.in_features % spec.granularity.tile(layer.shape)[1]:
            return f"{spec.granularity} does not divide the {layer.in_features} inputs of {layer.module}"
        if not spec.symmetric and strategy not in ("channel", "group"):
            return f"compressed-tensors packs zero points per channel or per group, not {spec.granularity}, {where}"
        inputs = layer.scheme.input
        if layer.scheme.output is not None or (inputs is not None and _activation(inputs) is None):
            asked = inputs.describe() if inputs else "at the output"
            return f"compressed-tensors has no form for activations {asked}, {where}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec, kind = layer.scheme.weight, _format(layer.scheme)
        rows, cols = layer.shape
        scales = _scale_shape(spec, layer.shape)
        found: list[tuple[str, torch.dtype, tuple[int, ...]]]
        if kind == PACKED:
            bits = spec.format.bits
            found = [
                ("weight_packed", torch.int32, (rows, math.ceil(cols * bits / 32))),
                ("weight_scale", _scale_dtype(spec), scales),
                ("weight_shape", torch.int64, (2,)),
            ]
            if not spec.symmetric:
                found.append(("weight_zero_point", torch.int32, (math.ceil(scales[0] * bits / 32), scales[1])))
            if spec.ordered:
                found.append(("weight_g_idx", torch.int32, (cols,)))
        elif kind in (NVFP4, MXFP4):
            dtype = torch.uint8 if kind == MXFP4 else torch.float8_e4m3fn
            found = [("weight_packed", torch.uint8, (rows, cols // 2)), ("weight_scale", dtype, scales)]
            if kind == NVFP4:
                found.append(("weight_global_scale", torch.float32, (1,)))
                if layer.scheme.input is not None:
                    found.append(("input_global_scale", torch.float32, (1,)))
        else:
            dtype = torch.int8 if kind == INT else torch.float8_e4m3fn
            found = [("weight", dtype, (rows, cols)), ("weight_scale", _scale_dtype(spec), scales)]
        if layer.static_input is not None:
            found.append(("input_scale", _scale_dtype(layer.static_input), (1,)))
            if not layer.static_input.symmetric:
                found.append(("input_zero_point", torch.int8, (1,)))
        return [TensorSpec(f"{layer.module}.{suffix}", dtype, shape) for suffix, dtype, shape in found]

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        return self.encode_packed(layer, [PackedMatrix.of(q) for q in parts], inputs)

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        (q,) = parts
        check_inputs(layer, inputs)
        spec, kind = layer.scheme.weight, _format(layer.scheme)
        shape = _scale_shape(spec, layer.shape)
        found: dict[str, Tensor] = {}
        if kind in (NVFP4, MXFP4):
            found["weight_packed"] = q.words_as(torch.uint8)
            if isinstance(q.scale, QTensor):
                found["weight_scale"] = q.scale.codes.view(torch.float8_e4m3fn)
                assert isinstance(q.scale.scale, Tensor)
                found["weight_global_scale"] = 1.0 / q.scale.scale.to(torch.float32).reshape(1)
                if layer.scheme.input is not None:
                    found["input_global_scale"] = torch.tensor(
                        [layer.input_global_scale or 1 / NVFP4_INPUT_OUTER_SCALE]
                    )
            else:
                found["weight_scale"] = q.scale.view(torch.uint8)
        else:
            assert isinstance(q.scale, Tensor)
            found["weight_scale"] = q.scale.reshape(shape)
            if kind == PACKED:
                bits, offset = spec.format.bits, spec.format.code_offset
                found["weight_packed"] = q.words_as(torch.int32)
                found["weight_shape"] = torch.tensor(layer.shape, dtype=torch.int64)
                if q.zero is not None:
                    found["weight_zero_point"] = pack(_unsigned(q.zero, offset), bits, torch.int32, axis=0)
            else:
                codes = q.words_as(torch.uint8)
                found["weight"] = _signed(codes, 128, spec) if kind == INT else codes.view(torch.float8_e4m3fn)
        for static in inputs:
            found["input_scale"] = static.scale.reshape(1)
            if static.zero is not None:
                found["input_zero_point"] = static.zero.reshape(1)
        return {f"{layer.module}.{suffix}": tensor.contiguous() for suffix, tensor in found.items()}

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec, kind = layer.scheme.weight, _format(layer.scheme)
        down, across = spec.granularity.tiles(layer.shape)

        def get(suffix: str) -> Tensor:
            return read(f"{layer.module}.{suffix}")

        if kind in (NVFP4, MXFP4):
            stored = get("weight_scale")
            if isinstance(spec.scale, QuantSpec):
                outer = _as_power_of_two((1.0 / get("weight_global_scale")).reshape(1, 1))
                scale = QTensor(stored.view(torch.uint8), outer, None, spec.scale)
            else:
                scale = stored.view(torch.float8_e8m0fnu)
            return [PackedMatrix(get("weight_packed"), scale, None, spec, layer.shape)]
        scale, zero, order = get("weight_scale").reshape(down, across), None, None
        if kind == PACKED:
            words, bits, offset = get("weight_packed"), spec.format.bits, spec.format.code_offset
            if not spec.symmetric:
                zero = _signed(unpack(get("weight_zero_point"), bits, down, axis=0), offset, spec)
            if spec.ordered:
                order = order_of(get("weight_g_idx"), spec.granularity.cols or 1, f"{layer.module}.weight_g_idx")
                words = in_order(words, order, bits)
        else:
            words = get("weight").view(torch.uint8)
            if tuple(words.shape) != layer.shape:
                raise CheckpointError(f"{layer.module}: codes of shape {tuple(words.shape)}, {layer.shape} is needed")
            words = _unsigned(words, spec.format.code_offset)
        return [PackedMatrix(words, scale, zero, spec, layer.shape, order=order)]

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        if layer.static_input is None:
            return []
        scale = read(f"{layer.module}.input_scale").reshape(1, 1)
        symmetric = layer.static_input.symmetric
        return [StaticInput(scale, None if symmetric else read(f"{layer.module}.input_zero_point").reshape(1, 1))]

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """One group for each scheme. With a single scheme the target is the class Linear and the kept linears are
        ignored by name; with several, every layer is named. Names are given as on disk (vLLM) and as in memory
        (transformers) where they differ."""
        by_scheme: dict[str, list[StoredLayer]] = {}
        for layer in layers:
            by_scheme.setdefault(repr(layer.scheme), []).append(layer)
        ordered = sorted(by_scheme.values(), key=lambda members: (-len(members), members[0].module))
        single = len(ordered) == 1
        groups = {
            f"group_{i}": {
                "targets": [*(["Linear"] if single else ()), *_names(_targets(members, single))],
                "format": _format(members[0].scheme),
                "weights": _weights(members[0].scheme.weight),
                "input_activations": None if (s := members[0].scheme.input) is None else _activation(s),
                "output_activations": None,
            }
            for i, members in enumerate(ordered)
        }
        # transformers 5.23 with compressed-tensors 0.20 cannot keep packed zero points compressed, nor FP4 in a float32
        # model, nor linears with a forward of their own. With one scheme it can dequantize on load, which is what it
        # does at the first forward anyway.
        first = layers[0].scheme
        awkward = not first.weight.symmetric or first.weight.format == FP4_E2M1
        awkward = awkward or any(layer.role == "linear" and layer.class_name != "Linear" for layer in layers)
        dense = {"dequantize": True} if single and awkward and first.input is None else {}
        formats = {str(group["format"]) for group in groups.values()}
        ignore = _names((module, memory) for module, memory, _ in kept) if single else []
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            **dense,
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": version("compressed-tensors"),
        }


def _targets(members: Sequence[StoredLayer], single: bool) -> list[tuple[str, str]]:
    """What a group names: every layer, or beside the class the head, which is of another class in vLLM and SGLang."""
    return [(m.module, m.memory_module) for m in members if not single or m.role == "lm_head"]


def _names(pairs: Any) -> list[str]:
    return list(dict.fromkeys(name for pair in pairs for name in pair))


def _unsigned(codes: Tensor, offset: int) -> Tensor:
    """Codes + offset in [0, 2**bits) as uint8 (two's complement makes the sum right without a wider dtype)."""
    return codes.view(torch.uint8) + offset if offset else codes


def _signed(codes: Tensor, offset: int, spec: QuantSpec) -> Tensor:
    return (codes.to(torch.uint8) - offset).view(torch.int8) if offset else codes.to(spec.format.code_dtype)


def _format(scheme: Scheme) -> str | None:
    """The compressed-tensors format of a scheme, or None."""
    spec = scheme.weight
    if spec.format == FP4_E2M1:
        plain = (spec.format, spec.granularity, spec.scale)
        for known, name in ((nvfp4(), NVFP4), (mxfp4(), MXFP4)):
            if plain == (known.format, known.granularity, known.scale):
                return name
        return None
    if spec.scale not in (FP32, FP16, BF16) or spec.zero_point in ("real", "minimum"):  # scales tell the decoded dtype
        return None
    if spec.format == FP8_E4M3:
        return FLOAT
    if isinstance(spec.format, IntFormat) and spec.format.signed and spec.format.bits <= 8:
        int8_inputs = scheme.input is not None and scheme.input.format == IntFormat(8)
        return INT if spec.format.bits == 8 and spec.symmetric and int8_inputs else PACKED
    return None


def _as_power_of_two(scale: Tensor) -> Tensor:
    """`scale` as E8M0, as we choose it; other writers' scales that are no power of two stay float32."""
    stored = scale.to(torch.float8_e8m0fnu)
    return stored if torch.equal(stored.to(torch.float32), scale) else scale


def _scale_shape(spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    return (1,) if spec.granularity.kind == "tensor" else spec.granularity.tiles(shape)


def _scale_dtype(spec: QuantSpec) -> torch.dtype:
    assert isinstance(spec.scale, FloatFormat)
    dtype = spec.scale.torch_dtype
    assert dtype is not None
    return dtype


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "int" if isinstance(spec.format, IntFormat) else "float",
        "symmetric": spec.symmetric,
        "group_size": spec.granularity.cols if spec.granularity.kind == "group" else None,
        "strategy": spec.granularity.kind,
        "dynamic": spec.dynamic,
    }
    if spec.format == FP4_E2M1:
        nested = isinstance(spec.scale, QuantSpec)
        arguments["scale_dtype"] = "torch.float8_e4m3fn" if nested else "torch.uint8"
        if nested:
            arguments["strategy"] = "tensor_group"
            arguments["dynamic"] = "local" if spec.dynamic else False
    return arguments


def _weights(spec: QuantSpec) -> dict[str, Any]:
    arguments = {**_arguments(spec), "observer": "mse" if spec.range.name == "mse" else "minmax"}
    if spec.granularity.kind == "block":
        arguments["block_structure"] = [spec.granularity.rows, spec.granularity.cols]
    if not spec.symmetric:
        arguments["zp_dtype"] = "torch.int8"
    return arguments


def _activation(spec: QuantSpec) -> dict[str, Any] | None:
    """Arguments for activations, or None where compressed-tensors has no form, or no engine runs it."""
    if spec.threshold or spec.clusters:
        return None
    arguments = _arguments(spec)
    if not spec.dynamic:
        plain = isinstance(spec.scale, FloatFormat) and spec.scale in (FP32, FP16, BF16)
        if arguments["strategy"] != "tensor" or not plain or spec.format not in (IntFormat(8), FP8_E4M3):
            return None
        if spec.zero_point == "real":
            return None
        arguments["observer"] = "mse" if spec.range.name == "mse" else "minmax"
        if not spec.symmetric:
            arguments["zp_dtype"] = "torch.int8"
        return arguments
    if not spec.symmetric:
        return None
    if spec.format not in (IntFormat(8), FP8_E4M3, FP4_E2M1) or arguments["strategy"] not in (
        *("channel", "tensor", "group"),
        "tensor_group",
    ):
        return None
    if arguments["strategy"] == "channel":
        arguments["strategy"] = "token"
    return arguments
