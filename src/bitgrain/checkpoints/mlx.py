"""The layout of MLX, which mlx-lm saves and loads.

Tensors of a layer `M` [out, in] (mlx 0.32, `mlx.core.quantize`; mlx-lm's `quantize_model`):

| mode   | tensors |
|---|---|
| affine | M.weight uint32 [out, in * bits / 32], M.scales and M.biases [out, in / group] in one float dtype: |
|        | weight = scale * code + bias; codes of 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128 |
| mxfp4  | M.weight uint32 [out, in / 8], M.scales uint8 [out, in / 32] (E8M0) |
| mxfp8  | M.weight uint32 [out, in / 4] (E4M3), M.scales uint8 [out, in / 32] (E8M0) |
| nvfp4  | M.weight uint32 [out, in / 8], M.scales uint8 [out, in / 16] (E4M3), no global scale |

Codes are packed densely, low bits first, whatever their width. The bias of symmetric integers is -2**(bits - 1) times
the scale, a product that is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import Read, StoredLayer, check_inputs
from bitgrain.checkpoints.mlx_reader import MODES, is_mlx, mode_of, read_layers
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.checkpoints.spellings import near_spellings
from bitgrain.errors import SchemeError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix, float_dtype

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FLOATS = (FP16, BF16, FP32)


class MLX:
    """See `Layout`."""

    name = "mlx"
    summary = "mlx-lm on Apple silicon; integers of 2 to 8 bits in groups, MXFP4, MXFP8, NVFP4, embeddings too"
    keys: tuple[str, ...] = ("quantization", "quantization_config")
    storages: tuple[Format, ...] = ()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return is_mlx(config)

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        return read_layers(config, checkpoint)

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        spec = layer.scheme.weight
        if not isinstance(spec.format, IntFormat):
            return (spec, *(mode for mode in MODES.values() if mode.format == spec.format))
        wide = (IntFormat(next((bits for bits in BITS if bits >= spec.format.bits), 8), False),)
        # MLX multiplies in the dtype of the scales, which must not be less than the layer's
        stores = {torch.float16: (FP16, FP32), torch.bfloat16: (BF16, FP32)}.get(layer.dtype, (FP32,))
        plain = (replace(spec, scale=one, minimum=None if spec.minimum is None else one) for one in stores)
        return (found for one in plain for found in near_spellings(one, wide, (one.scale,), ("minimum",)))

    def refusal(self, layer: StoredLayer) -> str | None:
        spec, where = layer.scheme.weight, f"for {layer.module}"
        if layer.role == "conv":
            return f"MLX quantizes matrices, {layer.module} is {layer.class_name}"
        if layer.transposed:
            return f"{layer.module} is stored as [in, out] ({layer.class_name}), which MLX does not know"
        if layer.experts > 1:
            return f"{layer.module} stacks {layer.experts} experts under a name that mlx-lm does not use"
        if layer.scheme.input is not None or layer.scheme.output is not None:
            return f"MLX multiplies by inputs as they are, {where}; choose a weight-only scheme"
        if spec.outliers or spec.columns or spec.ordered:
            return f"MLX has no place for the parts of {spec.describe()}, {where}"
        group = spec.granularity.cols
        if spec.granularity.rows != 1 or group is None or layer.in_features % group:
            return f"MLX has groups that divide the {layer.in_features} inputs, not {spec.granularity}, {where}"
        if mode_of(spec) is not None:
            return None
        if not isinstance(spec.format, IntFormat) or spec.format.bits not in BITS or group not in GROUPS:
            bits, groups = (", ".join(map(str, numbers)) for numbers in (BITS, GROUPS))
            return f"MLX has integers of {bits} bits in groups of {groups}, not {spec.describe()}, {where}"
        if spec.scale not in _FLOATS:
            return f"MLX stores scales plainly, not as {spec.describe()}, {where}"
        if spec.symmetric:
            return (
                None
                if spec.format.signed
                else f"MLX has symmetric integers that are signed, not {spec.format}, {where}"
            )
        if spec.zero_point != "minimum" or spec.minimum != spec.scale or spec.format.signed:
            return f"MLX stores biases like scales, for unsigned codes, not {spec.describe()}, {where}"
        return None

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        spec = layer.scheme.weight
        assert isinstance(spec.scale, Format)
        tiles = spec.granularity.tiles(layer.shape)
        words = (layer.out_features, layer.in_features * spec.format.bits // 32)
        affine = mode_of(spec) is None
        dtype = float_dtype(spec.scale) if affine else torch.uint8
        return [
            TensorSpec(f"{layer.module}.weight", torch.uint32, words),
            TensorSpec(f"{layer.module}.scales", dtype, tiles),
            *([TensorSpec(f"{layer.module}.biases", dtype, tiles)] if affine else []),
        ]

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        return self.encode_packed(layer, [PackedMatrix.of(q) for q in parts], inputs)

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        check_inputs(layer, inputs)
        (q,) = parts
        assert isinstance(q.scale, Tensor)
        words = q.words_as(torch.int32).view(torch.uint32)
        if mode_of(q.spec) is not None:
            return {f"{layer.module}.weight": words, f"{layer.module}.scales": q.scale.contiguous().view(torch.uint8)}
        biases = -(q.minimum if isinstance(q.minimum, Tensor) else q.scale * q.spec.format.code_offset)
        if not bool(biases.isfinite().all().item()):
            raise SchemeError(f"{layer.module}: its biases overflow {q.spec.scale}; store scales in float32")
        return {
            f"{layer.module}.weight": words,
            f"{layer.module}.scales": q.scale.contiguous(),
            f"{layer.module}.biases": biases.contiguous(),
        }

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        return [one.unpack() for one in self.decode_packed(layer, read)]

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        spec = layer.scheme.weight
        words = read(f"{layer.module}.weight").view(torch.int32)
        scale = read(f"{layer.module}.scales")
        if mode_of(spec) is not None:
            assert isinstance(spec.scale, Format)
            scale = scale.view(float_dtype(spec.scale))
        minimum = None if spec.minimum is None else -read(f"{layer.module}.biases")
        return [PackedMatrix(words, scale, None, spec, layer.shape, minimum=minimum)]

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        return []

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        return []

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """The commonest settings for all, and by name what differs, or is kept (False)."""
        each = {layer.module: _settings(layer.scheme.weight) for layer in layers}
        common = Counter(tuple(settings.items()) for settings in each.values()).most_common(1)[0][0]
        others = {module: settings for module, settings in each.items() if tuple(settings.items()) != common}
        return {**dict(common), **others, **{module: False for module, _, _ in kept if module not in each}}


def _settings(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.granularity.cols, "bits": spec.format.bits, "mode": mode_of(spec) or "affine"}
