"""config.json of auto-round's own files ("quant_method": "auto-round"): how they are packed, how layers are quantized.

`packing_format` names a layout of others; `extra_config` maps names of modules, or expressions that match at their
start, to what is different there. What would change the numbers and is not read is refused: inputs that are quantized
(`act_bits`), codes that are no integers (`data_type`), rotated inputs (`rotation_config`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoints.patterns import name_matches
from bitgrain.errors import CheckpointError

AUTO_ROUND = "auto-round"
_PACKED: dict[str, str] = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq"), "gptq"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2"), "gptq-v2"),
    "auto_round:auto_awq": "awq",
}
_PLAIN = re.compile(r"[\w.-]*")
"""A name that is no expression."""


def packed_as(own: Mapping[str, Any]) -> str | None:
    """The name of the layout of a checkpoint with this `quantization_config`; None for packings that are not known,
    and for files that are not auto-round's own."""
    return _PACKED.get(str(own.get("packing_format"))) if own.get("quant_method") == AUTO_ROUND else None


def auto_round_settings(module: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """`own`, with what differs for `module`. Raises CheckpointError for a layer whose numbers depend on more than its
    integers."""
    if own.get("rotation_config") or own.get("rotation_configs"):
        raise CheckpointError(
            "quantization_config: auto-round rotated the inputs (rotation_config), which is not read; quantize the "
            "original without"
        )
    found = {**own, **_override(module, settings_table(own, "extra_config"))}
    codes, inputs = found.get("data_type") or "int", found.get("act_bits") or 16
    if str(codes).split("_")[0] != "int":
        raise CheckpointError(
            f"quantization_config: auto-round's codes of {module} are {codes!r}; integers are read, so export its "
            "format llm_compressor"
        )
    if type(inputs) is not int or inputs < 16:
        raise CheckpointError(
            f"quantization_config: auto-round quantized the inputs of {module} to {inputs!r} bits, which is not read; "
            "export its format llm_compressor"
        )
    return found


def settings_table(own: Mapping[str, Any], key: str) -> Mapping[str, Mapping[str, Any]]:
    """`own[key]`, settings by module; empty where there is none. Raises CheckpointError if it is something else."""
    found: Any = own.get(key) or {}
    if not isinstance(found, Mapping) or not all(isinstance(values, Mapping) for values in found.values()):
        raise CheckpointError(f"quantization_config: {key} is no table of settings by module")
    return found


def _override(module: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    matching = (key for key in table if not _PLAIN.fullmatch(key) and name_matches(key, module))
    found = table.get(module) or table.get(next(matching, ""), {})
    return {key: value for key, value in found.items() if value is not None}
