"""Which layers of an MLX checkpoint are quantized, and how: from its config, headers, and scales beside biases.

Layout: see `checkpoints.mlx`. A layer whose biases are all -2**(bits - 1) times its scales is read as symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.linear_layers import kept_dtype
from bitgrain.checkpoints.reader import Checkpoint, StoredTensor
from bitgrain.checkpoints.settings import Lenient, parse, section
from bitgrain.errors import CheckpointError
from bitgrain.numerics import IntFormat, QuantSpec, mxfp4, per_group
from bitgrain.numerics.formats import BF16, E8M0, FP4_E2M1, FP8_E4M3, FP16, FP32
from bitgrain.recipes import Scheme

MODES = {
    "mxfp4": mxfp4(),
    "mxfp8": QuantSpec(FP8_E4M3, per_group(32), scale=E8M0),
    "nvfp4": QuantSpec(FP4_E2M1, per_group(16), scale=FP8_E4M3),
}
_STORAGE = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_PIECE = 1 << 20


class Settings(Lenient):
    """Of one layer, or of all."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether config.json is one of mlx-lm's quantized models."""
    settings = section(config, "quantization")
    return "group_size" in settings and "bits" in settings


def mode_of(spec: QuantSpec) -> str | None:
    """The mode of floating-point codes that `spec` is, or None."""
    wanted = (spec.format, spec.granularity, spec.scale)
    known = (name for name, mode in MODES.items() if (mode.format, mode.granularity, mode.scale) == wanted)
    return next(known, None) if spec.symmetric else None


def read_layers(config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
    """Every module with `scales` on disk. Raises CheckpointError for what is damaged, missing or unknown."""
    given = section(config, "quantization")
    common = parse(Settings, given, "quantization")
    dtype = kept_dtype(checkpoint.entries) or torch.bfloat16
    layers: list[StoredLayer] = []
    for name, scales in checkpoint.entries.items():
        module, found, rest = name.rpartition(".scales")
        if not found or rest:
            continue
        own = given.get(module)
        settings = parse(Settings, own, f"quantization, {module}") if isinstance(own, dict) else common
        words = checkpoint.entries.get(f"{module}.weight")
        if words is None or words.dtype != torch.uint32 or len(words.shape) != 2 or len(scales.shape) != 2:
            raise CheckpointError(
                f"{module}: a matrix of uint32 words and one of scales are needed (stacks of experts are not read)"
            )
        rows, cols = words.shape[0], words.shape[1] * 32 // settings.bits
        if words.shape[1] * 32 % settings.bits or tuple(scales.shape) != (rows, -(-cols // settings.group_size)):
            raise CheckpointError(
                f"{module}: words {list(words.shape)} and scales {list(scales.shape)} are not of {settings.bits} bits "
                f"in groups of {settings.group_size}; config.json lacks the settings of this layer"
            )
        spec = _spec(module, settings, scales, checkpoint)
        embedding = "embed" in module
        layers.append(
            StoredLayer(
                tensor=f"{module}.weight",
                module=module,
                memory_module=module,
                class_name="Embedding" if embedding else "Linear",
                role="embedding" if embedding else "linear",
                out_features=rows,
                in_features=cols,
                experts=1,
                transposed=False,
                dtype=scales.dtype if scales.dtype in _STORAGE else dtype,
                scheme=Scheme(f"MLX_{settings.bits}BIT", spec),
            )
        )
    if not layers:
        raise CheckpointError(f"{checkpoint.folder}: config.json speaks of quantized layers of MLX, and there are none")
    return layers


def _spec(module: str, settings: Settings, scales: StoredTensor, checkpoint: Checkpoint) -> QuantSpec:
    if settings.mode != "affine":
        spec = MODES[settings.mode]
        if (spec.format.bits, spec.granularity.cols) != (settings.bits, settings.group_size):
            raise CheckpointError(f"{module}: {settings.mode} has {spec.format.bits} bits in {spec.granularity}")
        return spec
    biases = checkpoint.entries.get(f"{module}.biases")
    storage = _STORAGE.get(scales.dtype)
    if biases is None or (biases.shape, biases.dtype) != (scales.shape, scales.dtype) or storage is None:
        raise CheckpointError(f"{module}.biases are needed, in the shape and dtype of its scales")
    tiles = per_group(settings.group_size)
    if _symmetric(checkpoint, scales, biases, 2 ** (settings.bits - 1)):
        return QuantSpec(IntFormat(settings.bits), tiles, scale=storage)
    return QuantSpec(IntFormat(settings.bits, False), tiles, zero_point="minimum", scale=storage, minimum=storage)


def _symmetric(checkpoint: Checkpoint, scales: StoredTensor, biases: StoredTensor, offset: int) -> bool:
    """Whether all biases are -offset times their scales; looks no further than to the first that is not."""
    step = max(1, _PIECE // max(1, scales.shape[1]))
    for i in range(0, scales.shape[0], step):
        stop = min(i + step, scales.shape[0])
        ours = checkpoint.read_rows(scales.name, i, stop).float() * -offset
        if not torch.equal(ours, checkpoint.read_rows(biases.name, i, stop).float()):
            return False
    return True
