"""Which layers of a bitsandbytes checkpoint are quantized, and how: from its config, headers and quant states.

Layouts: see `checkpoints.bitsandbytes`. Blocks run over the flattened matrix; those that go over the ends of rows are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.linear_layers import kept_dtype, linear_layer
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.safetensors_header import strict_json
from bitgrain.checkpoints.settings import section
from bitgrain.errors import CheckpointError
from bitgrain.numerics import CodebookFormat, Format, IntFormat, QuantSpec, get_format, per_channel, per_group, per_run
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.recipes import Scheme

NF4, FP4 = get_format("nf4"), get_format("bnb_fp4")
NAMES: dict[Format, str] = {NF4: "nf4", FP4: "fp4"}
SCB = QuantSpec(CodebookFormat("127ths", (0.0, float(torch.tensor(1 / 127)))), per_channel(), scale=FP32)
"""The largest number of a row, of which the scale is one 127th."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_STATE = ".weight.quant_state.bitsandbytes__"
_STATE_BYTES = 1 << 16
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def settings_of(config: Mapping[str, Any]) -> str | None:
    """ "nf4", "fp4" or "int8", out of config.json; None where bitsandbytes did not quantize."""
    settings = section(config)
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return "nf4" if settings.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    return None


def read_4bit(checkpoint: Checkpoint) -> list[StoredLayer]:
    """Every layer with a quant state. Raises CheckpointError for what is damaged, missing or crosses rows."""
    tables: dict[bytes, Format] = {}
    layers: list[StoredLayer] = []
    for name in checkpoint.entries:
        module, found, kind = name.partition(_STATE)
        if not found:
            continue
        format = next((format for format, known in NAMES.items() if known == kind), None)
        if format is None:
            raise CheckpointError(f"{name}: 4-bit weights of bitsandbytes are nf4 or fp4, not {kind}")
        layers.append(_layer_4bit(module, format, _state(checkpoint, name, kind), checkpoint, tables))
    return _some(layers, checkpoint, "4-bit")


def read_int8(settings: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
    """Every layer with an SCB. Raises CheckpointError."""
    threshold = settings.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise CheckpointError(f"quantization_config: llm_int8_threshold {threshold!r} is no threshold")
    inputs = QuantSpec(IntFormat(8), per_channel(), restricted=True, dynamic=True, threshold=float(threshold))
    dtype, layers = kept_dtype(checkpoint.entries) or torch.bfloat16, []
    for name in checkpoint.entries:
        module, found, rest = name.rpartition(".SCB")
        if not found or rest:
            continue
        codes = _needed(checkpoint, f"{module}.weight", (torch.int8,))
        if len(codes) != 2:
            raise CheckpointError(f"{module}.weight has the shape {codes}, a matrix is needed")
        _needed(checkpoint, name, (torch.float32,), codes[0])
        order = f"{module}.weight_format"
        if order in checkpoint.entries and bool(checkpoint.read(order).any().item()):
            raise CheckpointError(f"{order}: only rows (0) are read; save it again with bitsandbytes 0.45 or newer")
        weight = QuantSpec(IntFormat(8), per_channel(), restricted=True, scale=_storage(checkpoint.read(name)))
        scheme = Scheme("LLM_INT8", weight, inputs)
        layers.append(linear_layer(module, codes[0], codes[1], weight, dtype, scheme))
    return _some(layers, checkpoint, "int8")


def _storage(scb: Tensor) -> Format | QuantSpec:
    """In which scales can be kept that this is 127 times of; else as it is."""
    exact = scb / 127
    for storage, dtype in ((FP16, torch.float16), (BF16, torch.bfloat16)):
        if torch.equal(exact.to(dtype).float() * 127, scb):
            return storage
    return SCB


def _layer_4bit(
    module: str, format: Format, state: Mapping[str, Any], checkpoint: Checkpoint, tables: dict[bytes, Format]
) -> StoredLayer:
    rows, cols = state["shape"]
    block, name = state["blocksize"], f"{module}.weight"
    if cols % block:
        raise CheckpointError(
            f"{name}: blocks of {block} go over the ends of its rows of {cols}, which bitgrain cannot hold; quantize "
            "the original with bitgrain instead"
        )
    stored = checkpoint.entries.get(name)
    if stored is None or stored.dtype != torch.uint8 or 2 * stored.nbytes != rows * cols:
        raise CheckpointError(
            f"{name}: {rows} x {cols} weights of 4 bits, two in a uint8, are needed, as its quant state says; save it "
            "with bnb_4bit_quant_storage uint8"
        )
    count = rows * cols // block
    scale: Format | QuantSpec = FP32
    nested = f"{name}.nested_absmax" in checkpoint.entries
    _needed(checkpoint, f"{name}.absmax", (torch.uint8 if nested else torch.float32,), count)
    _needed(checkpoint, f"{name}.quant_map", (torch.float32,), 16)
    table = checkpoint.read(f"{name}.quant_map").unique()
    if table.numel() != len(format.grid()) or not torch.allclose(table, format.grid(), atol=1e-6, rtol=0):
        raise CheckpointError(f"{name}.quant_map is not the table of {NAMES[format]}")
    if nested:
        run = state.get("nested_blocksize")
        if type(run) is not int or run < 1 or not _is_number(state.get("nested_offset")):
            raise CheckpointError(f"{name}: its quant state says nothing of its nested absmax")
        _needed(checkpoint, f"{name}.nested_absmax", (torch.float32,), -(-count // run))
        code = _codebook(checkpoint, f"{name}.nested_quant_map", tables)
        scale = QuantSpec(code, per_run(run), zero_point="minimum", minimum=FP32)
    weight = QuantSpec(format, per_group(block), scale=scale)
    scheme = Scheme(f"{NAMES[format].upper()}_BNB", weight)
    return linear_layer(module, rows, cols, weight, _DTYPES[str(state["dtype"])], scheme)


def _codebook(checkpoint: Checkpoint, name: str, tables: dict[bytes, Format]) -> Format:
    """The format of a nested map: writers' maps differ in their last bits, so it is read, and named if it is ours."""
    _needed(checkpoint, name, (torch.float32,), 256)
    values = checkpoint.read(name)
    key = values.numpy().tobytes()
    if key not in tables:
        if not bool((values[1:] > values[:-1]).all().item()) or not bool(values.isfinite().all().item()):
            raise CheckpointError(f"{name}: 256 ascending numbers are needed")
        known = get_format("dynamic8")
        ours = torch.equal(values, known.grid())
        tables[key] = known if ours else CodebookFormat("bnb_map", tuple(values.tolist()))
    return tables[key]


def _state(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Any]:
    """The quant state's JSON, as far as it is read, checked."""
    entry = checkpoint.entries[name]
    if entry.dtype != torch.uint8 or entry.nbytes > _STATE_BYTES:
        raise CheckpointError(f"{name}: JSON of at most {_STATE_BYTES} bytes is needed")
    try:
        state = strict_json(bytes(checkpoint.read(name).tolist()))
    except ValueError as error:
        raise CheckpointError(f"{name}: not JSON: {error}") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if (
        not isinstance(state, dict)
        or state.get("quant_type") != kind
        or type(state.get("blocksize")) is not int
        or state["blocksize"] not in BLOCKS
        or str(state.get("dtype")) not in _DTYPES
        or not isinstance(shape, list)
        or len(shape) != 2
        or any(type(size) is not int or not 0 < size < 1 << 31 for size in shape)
    ):
        raise CheckpointError(f"{name}: quant_type {kind}, blocksize, dtype and the shape of a matrix are needed")
    return state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _needed(
    checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], count: int | None = None
) -> tuple[int, ...]:
    """The shape of a tensor. Raises CheckpointError unless it is there, of such a dtype and number of elements."""
    entry = checkpoint.entries.get(name)
    if entry is None:
        raise CheckpointError(f"{name} is missing: the checkpoint is incomplete")
    if entry.dtype not in dtypes or (count is not None and math.prod(entry.shape) != count):
        size = "" if count is None else f"{count} of "
        raise CheckpointError(f"{name}: {size}{dtypes[0]} are needed, not {entry.dtype} {entry.shape}")
    return entry.shape


def _some(layers: list[StoredLayer], checkpoint: Checkpoint, kind: str) -> list[StoredLayer]:
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json speaks of {kind} weights of bitsandbytes, and there are none; save the "
            "model once it is quantized"
        )
    return layers
