"""Engine rules: which engine loads what, and what it asks of a checkpoint. The one place where such rules live.

The rules are read from the engines' documentation and sources, not from running them here (transformers is the exception:
the tests load every layout with it); `bitgrain verify` checks a written checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import IntFormat
from bitgrain.numerics.formats import FP4_E2M1, FP8_E4M3


@dataclass(frozen=True)
class Verdict:
    """Whether `engine` loads the result; `reasons` say why not, or under which condition."""

    engine: str
    loads: bool
    reasons: tuple[str, ...] = ()


def judge(
    layers: Sequence[StoredLayer], fused: Sequence[tuple[str, Sequence[StoredLayer | None]]], layout: str
) -> list[Verdict]:
    """The verdict of each engine on a checkpoint with these quantized `layers` in `layout`.

    fused: (group, members) for each set of layers that engines join into one (q/k/v, gate/up); None for a kept member.
    """
    if layout != "compressed-tensors":
        reason = ("quant_method bitgrain is read by bitgrain.load only",)
        return [*(Verdict(engine, False, reason) for engine in ("vLLM", "SGLang", "transformers")), _OWN]
    mixed = [group for group, members in fused if len({_key(member) for member in members}) > 1]
    serving: dict[str, None] = {}
    for layer in layers:
        if reason := _vllm_refusal(layer):
            serving[reason] = None
    if mixed:
        more = f" and {len(mixed) - 1} more" if len(mixed) > 1 else ""
        serving[f"layers that it fuses have different schemes: {mixed[0]}{more}"] = None
    experts = any(layer.role == "expert" for layer in layers)
    inputs = any(layer.scheme.input is not None for layer in layers)
    transformers = ["runs experts without quantizing their inputs"] if experts and inputs else []
    schemes = {repr(layer.scheme) for layer in layers}
    asymmetric = any(not layer.scheme.weight.symmetric for layer in layers)
    readable = not asymmetric or (len(schemes) == 1 and not inputs)
    if not readable:
        transformers.append("cannot load packed zero points beside another scheme (compressed-tensors 0.20)")
    return [
        Verdict("vLLM", not serving, tuple(serving)),
        Verdict("SGLang", not serving, tuple(serving)),
        Verdict("transformers", readable, tuple(transformers)),
        _OWN,
    ]


_OWN = Verdict("bitgrain", True)


def _key(layer: StoredLayer | None) -> str:
    return "kept" if layer is None else repr(layer.scheme)


def _vllm_refusal(layer: StoredLayer) -> str | None:
    """Why vLLM's compressed-tensors kernels cannot run `layer`, or None."""
    spec, inputs = layer.scheme.weight, layer.scheme.input
    group = spec.granularity.cols
    if isinstance(spec.format, IntFormat):
        if inputs is None and spec.format.bits not in (4, 8):
            return f"has no kernel for {spec.format.bits}-bit weights (4 and 8 bits only)"
        if inputs is None and spec.granularity.rows is None:
            return "weight-only kernels need scales per channel or per group"
        if inputs is not None and inputs.format == IntFormat(16):
            return "has no kernel for 16-bit integer activations"
        if inputs is not None and spec.format.bits == 4 and inputs.format == IntFormat(8):
            return "runs W4A8 on Arm CPUs only"
        if inputs is None and not spec.symmetric and spec.format.bits == 8:
            return "has no kernel for asymmetric 8-bit weights"
        if group not in (None, 32, 64, 128):
            return f"has no kernel for groups of {group}"
        if inputs is None and (layer.out_features % 64 or layer.in_features % 128) and spec.format.bits == 4:
            return f"its 4-bit kernels need outputs % 64 = 0 and inputs % 128 = 0, not {layer.shape} as in {layer.module}"
    if spec.format == FP8_E4M3 and group and layer.in_features % group:
        return f"block-wise FP8 needs inputs divisible by {group}"
    if spec.format == FP4_E2M1 and layer.in_features % 32:
        return "FP4 kernels need inputs divisible by 32"
    return None
