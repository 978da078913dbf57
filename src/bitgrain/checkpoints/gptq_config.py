"""What config.json says of GPTQ layers: one setting for all, and `dynamic` for the layers that differ.

`dynamic` (GPTQModel's, which vLLM reads too) maps a regular expression of module names to what is different there; the
first that matches at the start of a name counts. "-:" before it means "not quantized", "+:" or nothing "with these
values". Of files of auto-round's own, see `checkpoints.auto_round`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bitgrain.checkpoints.auto_round import AUTO_ROUND, auto_round_settings, settings_table
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.patterns import name_matches
from bitgrain.errors import CheckpointError
from bitgrain.numerics import Format, IntFormat, QuantSpec, per_channel, per_group

BITS = (2, 3, 4, 8)
_JOINED: dict[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""The names that vLLM looks up for layers which it joins."""


@dataclass(frozen=True)
class Settings:
    """How one layer is quantized. group -1: a scale for each output channel; ordered: g_idx orders the columns."""

    bits: int
    group: int
    symmetric: bool
    ordered: bool

    @staticmethod
    def of(spec: QuantSpec) -> Settings:
        return Settings(spec.format.bits, spec.granularity.cols or -1, spec.symmetric, spec.ordered)

    def spec(self, scale: Format) -> QuantSpec:
        """The spec of such a layer whose scales are stored as `scale`."""
        whole = self.group == -1
        return QuantSpec(
            IntFormat(self.bits),
            per_channel() if whole else per_group(self.group),
            zero_point="none" if self.symmetric else "integer",
            scale=scale,
            ordered=self.ordered and not whole,
        )

    def as_config(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.ordered,
            "sym": self.symmetric,
        }


def settings_of(module: str, config: Mapping[str, Any]) -> Settings:
    """The settings of a quantized module. Raises CheckpointError for what is damaged or not known."""
    if config.get("quant_method") == AUTO_ROUND:
        own = auto_round_settings(module, config)
    else:
        own = {**config, **_override(module, config)}
    merged = {"desc_act": False, "sym": True, **own}
    bits, group, symmetric, ordered = (merged.get(key) for key in ("bits", "group_size", "sym", "desc_act"))
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"quantization_config: {module} has codes of {bits!r} bits; GPTQ has {BITS}")
    if type(group) is not int or (group != -1 and group < 1):
        raise CheckpointError(
            f"quantization_config: {module} has group_size {group!r}, neither a number of inputs nor -1"
        )
    if type(symmetric) is not bool or type(ordered) is not bool:
        raise CheckpointError(f"quantization_config: sym and desc_act of {module} are {symmetric!r} and {ordered!r}")
    return Settings(bits, group, symmetric, ordered)


def _override(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is different for `module`."""
    for pattern, values in settings_table(config, "dynamic").items():
        if pattern.startswith("-:"):
            if name_matches(pattern[2:], module):
                raise CheckpointError(f"{module} is quantized, but quantization_config says it is not: {pattern!r}")
        elif name_matches(pattern.removeprefix("+:"), module):
            return values
    return {}


def gptq_config(
    layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]], checkpoint_format: str
) -> dict[str, Any]:
    """`quantization_config` for these layers; `kept`: (module, memory module, class) of matrices kept."""
    settings = [Settings.of(layer.scheme.weight) for layer in layers]
    counted = Counter(one for one, layer in zip(settings, layers, strict=True) if layer.role != "lm_head")
    base = (counted or Counter(settings)).most_common(1)[0][0].as_config()
    dynamic: dict[str, dict[str, Any]] = {}
    for module, memory, _ in kept:
        if module != "lm_head":
            dynamic |= {f"-:{_pattern(name)}": {} for name in dict.fromkeys((module, memory))}
    for layer, own in zip(layers, settings, strict=True):
        different = {key: value for key, value in own.as_config().items() if value != base[key]}
        if different:
            dynamic |= {_pattern(name): different for name in dict.fromkeys((layer.module, layer.memory_module))}
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        **base,
        "lm_head": any(layer.role == "lm_head" for layer in layers),
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"bitgrain:{version('bitgrain')}"]},
    }


def _pattern(module: str) -> str:
    """An expression for `module` alone, and for what vLLM joins it into."""
    parent, dot, leaf = module.rpartition(".")
    joined = _JOINED.get(leaf)
    last = re.escape(leaf) if joined is None else f"(?:{leaf}|{joined})"
    return f"{re.escape(parent + dot)}{last}$"
