"""What each choice for each layer of a plan would cost, measured once and kept; and which layers choose together."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bitgrain.checkpoints.durable import replace_file
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Weight
from bitgrain.numerics import QuantSpec
from bitgrain.pipeline.blockwise.sensitivity import Costs, measure_costs
from bitgrain.pipeline.blockwise.streamed import streamed
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress
from bitgrain.runtime.device import resolve_device

SENSITIVITY_WINDOWS = 32
"""Calibration windows that are run backward."""
_BATCH = 4


def weigh(
    plan: Plan,
    layers: Mapping[str, StoredLayer],
    choices: Mapping[str, Sequence[QuantSpec]],
    *,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress,
) -> Costs:
    """The predicted cost of each of `choices` for each of `layers`, both by original tensor name.

    cache  a file for what was measured, so that a killed job need not measure again
    Layers that text does not run through are missing in what is returned.
    """
    assert plan.calibration is not None
    ids = plan.calibration.ids[:SENSITIVITY_WINDOWS]
    key = _key(plan, layers, choices, ids)
    if cache is not None and cache.exists():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["key"] == key:
            return Costs(**known["costs"])
    where = resolve_device(device)
    progress.start(sum(x.elements for x in layers.values()), "weights", f"weigh the layers of {plan.source.name}")
    try:
        with streamed(plan, where) as (stream, pool):
            costs = measure_costs(
                stream, ids.split(_BATCH), layers, lambda layer: choices[layer.tensor], pool, progress.advance
            )
    finally:
        progress.finish()
    if cache is not None:
        data = json.dumps({"key": key, "costs": asdict(costs)}).encode()
        replace_file(cache, data, cache.with_name(cache.name + ".part"))
    return costs


def _key(
    plan: Plan, layers: Mapping[str, StoredLayer], choices: Mapping[str, Sequence[QuantSpec]], ids: torch.Tensor
) -> str:
    described = {
        name: [*(spec.describe() for spec in specs), (given := layers[name].scheme.input) and given.describe()]
        for name, specs in choices.items()
    }
    told: Sequence[Any] = (described, plan.checkpoint.fingerprint(), ids.tolist())
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def given_a_scheme(plan: Plan) -> set[str]:
    """Those layers to which a rule of the recipe gives a scheme."""
    weights = plan.anatomy.weights
    return {weights[i].tensor for rule in plan.recipe.rules if rule.scheme is not None for i in rule.among(weights)}


def chosen_together(plan: Plan, names: Iterable[str]) -> list[list[str]]:
    """Layers that engines join share their choice: fused groups, and all experts of a block."""
    weights = {weight.tensor: weight for weight in plan.anatomy.weights}
    members: dict[str, list[str]] = defaultdict(list)
    for name in names:
        members[_together(weights[name])].append(name)
    return list(members.values())


def _together(weight: Weight) -> str:
    if weight.role == "expert":
        return f"experts of block {weight.block}"
    return weight.fused or weight.tensor
