"""Under which spec of a target each quantized layer says the same numbers: what a conversion decides first."""

from __future__ import annotations

from dataclasses import replace

import torch

from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.onnx.form import Form
from bitgrain.errors import PlanError, SchemeError
from bitgrain.numerics import QTensor
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.numerics.respell import plan_respelling, respell, respell_packed
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.pipeline.threads import work_through
from bitgrain.progress import Progress


def spell_all(
    stored: StoredModel, target: Layout | Form, progress: Progress, dtype: torch.dtype | None = None
) -> dict[str, StoredLayer]:
    """Every layer as the target stores it. dtype: in which it multiplies; None: in each layer's. Raises PlanError."""
    problems: list[str] = []
    computed = [key for key in ("online_rotations", "reordered_norms") if stored.config.get(key)]
    if computed and target.name != "bitgrain":
        problems.append(f"{target.name} has no place for what is computed at run time: {', '.join(computed)}")
    if stored.config.get("kv_cache_scheme") and target.name not in ("bitgrain", "compressed-tensors"):
        problems.append(f"{target.name} has no place for the scales of keys and values")

    def work(name: str) -> tuple[str, StoredLayer | str]:
        return name, spell(stored, stored.layers[name], target, dtype)

    said: dict[str, StoredLayer | str] = {}
    progress.start(len(stored.layers), "layers", "comparing")
    try:
        for name, one in work_through(work, stored.layers):
            said[name] = one
            progress.advance(1, name)
    finally:
        progress.finish()
    found = {name: one for name in stored.layers if not isinstance(one := said[name], str)}
    problems += [one for name in stored.layers if isinstance(one := said[name], str)]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PlanError(
            f"{stored.path} cannot be said exactly in {target.name}:\n  " + "\n  ".join(problems[:5]) + more
        )
    return found


def spell(
    stored: StoredModel, layer: StoredLayer, target: Layout | Form, dtype: torch.dtype | None = None
) -> StoredLayer | str:
    """`layer` under the first spec of the target that says the same numbers in `dtype` (None: its own), which it then
    has; or why there is none."""
    layer = layer if dtype is None else replace(layer, dtype=dtype)
    packed: list[PackedMatrix] = []
    parts: list[QTensor] = []
    reasons: list[str] = []
    inexact: list[str] = []
    for spec in dict.fromkeys(target.spellings(layer)):
        candidate = replace(layer, scheme=replace(layer.scheme, weight=spec))
        refusal = target.refusal(candidate)
        if refusal is None and spec == layer.scheme.weight:
            return candidate
        if refusal is None:
            packed = packed or stored.packed(layer.tensor)
            try:
                if not all(plan_respelling(one, spec).proven for one in packed):
                    parts = parts or [one.unpack() for one in packed]
                    for part in parts:
                        respell(part, spec, layer.dtype)
                return candidate
            except SchemeError as error:
                inexact.append(f"{layer.module}: as {spec.describe()}: {error}")
                continue
        reasons.append(refusal)
    return (inexact or reasons)[0]


def respelled(stored: StoredModel, layer: StoredLayer) -> list[PackedMatrix]:
    """The matrices of a layer under the spec that `spell` found for it; nothing is compared again."""
    spec = layer.scheme.weight
    return [
        one if one.spec == spec else respell_packed(one, spec, layer.dtype, compared=True)
        for one in stored.packed(layer.tensor)
    ]
