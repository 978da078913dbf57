"""Mixed precision at a fixed average: which layer gets how many bits, decided by what each choice is predicted to cost.

The result is a recipe with one rule for each layer, so everything after it (plan, job, resume) is as for any other
recipe, and it can be read, changed and used again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitgrain.checkpoints.durable import replace_file
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError
from bitgrain.models.anatomy import Weight
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.formats import FP16
from bitgrain.pipeline.blockwise.sensitivity import measure_costs
from bitgrain.pipeline.blockwise.streamed import streamed
from bitgrain.pipeline.plan import Plan, make_plan
from bitgrain.progress import Progress
from bitgrain.recipes import Recipe, Scheme, make_recipe
from bitgrain.recipes.recipe import Rule, SchemeModel
from bitgrain.runtime.device import resolve_device
from bitgrain.search.budget import Candidate, Group, allocate, least_bits
from bitgrain.search.candidates import candidate_specs

SENSITIVITY_WINDOWS = 32
"""Calibration windows that are run backward."""
_BATCH = 4


@dataclass(frozen=True)
class Mix:
    """What was decided: a recipe with a rule for each layer, and what it is predicted to cost.

    bits  stored bits for each quantized weight, scales at 16 bits as figures are published; kl: nats per token
    """

    recipe: Recipe
    bits: float
    kl: float
    notes: tuple[str, ...]


def allocate_bits(
    model: str | Path,
    recipe: Recipe,
    bits: float,
    *,
    engine: str = "compressed-tensors",
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress,
    **settings: Any,
) -> Mix:
    """Choose a scheme for each layer so that they average `bits` and lose least.

    recipe    its scheme says how activations are quantized, its rules which layers are kept or have a scheme already
              (their bits count); its calibration is used
    engine    whose candidates there are to choose from (`search.candidates`); settings: as for `make_plan`
    cache     a file for what was measured, so that a killed job need not measure again
    Raises PlanError for a budget below the least possible, SchemeError for an unknown engine, what `make_plan` raises.
    """
    draft = make_plan(model, recipe, calibrate=True, **settings)
    inside = {name: layer for name, layer in draft.quantized.items() if draft.anatomy.block_of[name] is not None}
    fixed = _fixed(draft, inside)
    layers = {name: layer for name, layer in inside.items() if name not in fixed}
    if not layers:
        raise PlanError("the recipe's rules leave no layer whose bits could be chosen")
    choices = {name: _specs(layer, engine, bits) for name, layer in layers.items()}
    elements = sum(layer.elements for layer in inside.values())
    taken = sum(_size(inside[name].scheme.weight, inside[name]) for name in fixed)
    unknown = {name: [0.0] * len(specs) for name, specs in choices.items()}
    least = taken + least_bits(_groups(draft, layers, choices, unknown, engine))
    if least > int(bits * elements):  # said before anything is measured
        raise PlanError(f"{bits:g} bits a weight are less than is possible here, {least / elements:.3f}: raise --bits")
    costs = _measured(draft, layers, choices, cache, engine, bits, device, progress)
    groups = _groups(draft, layers, choices, costs, engine)
    found = allocate(groups, int(bits * elements) - taken)
    rules = list(recipe.rules)
    used = Counter[str]()
    for group, candidate in zip(groups, found.chosen, strict=True):
        for name in group.members:
            layer = layers[name]
            scheme = Scheme(_scheme_name(candidate.choice, layer.scheme), candidate.choice, layer.scheme.input)
            rules.append(Rule(match=layer.module, scheme=SchemeModel.of(scheme)))
            used[scheme.name] += layer.elements
    for name in fixed:
        used[inside[name].scheme.name] += inside[name].elements
    average = (found.bits + taken) / elements
    shares = ", ".join(f"{name} {count / elements:.0%}" for name, count in sorted(used.items()))
    notes = (f"{average:.3f} bits a weight allocated by sensitivity (16-bit scales): {shares}",)
    mixed = make_recipe(**{**recipe.model_dump(), "rules": [rule.model_dump() for rule in rules]})
    return Mix(mixed, average, found.cost, notes)


def _fixed(plan: Plan, layers: dict[str, StoredLayer]) -> set[str]:
    """Those layers to which a rule of the recipe gives a scheme."""
    rules = [rule for rule in plan.recipe.rules if rule.scheme is not None]
    weights = {weight.tensor: weight for weight in plan.anatomy.weights}
    return {name for name in layers if any(rule.matches(weights[name]) for rule in rules)}


def _specs(layer: StoredLayer, engine: str, bits: float) -> list[QuantSpec]:
    specs = candidate_specs(engine, layer.shape, around=bits)
    return [spec.with_scale_dtype(layer.scheme.weight.scale_format) for spec in specs]


def _size(spec: QuantSpec, layer: StoredLayer) -> int:
    return layer.experts * spec.with_scale_dtype(FP16).count_bits(layer.shape)


def _groups(
    plan: Plan,
    layers: dict[str, StoredLayer],
    choices: dict[str, list[QuantSpec]],
    costs: dict[str, list[float]],
    engine: str,
) -> list[Group[QuantSpec]]:
    """Layers that engines join share their choice: fused groups, and all experts of a block."""
    weights = {weight.tensor: weight for weight in plan.anatomy.weights}
    members: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        members[_together(weights[name])].append(name)
    groups: list[Group[QuantSpec]] = []
    for names in members.values():
        candidates = [
            Candidate(
                spec,
                sum(_size(spec, layers[name]) for name in names),
                sum(costs[name][choices[name].index(spec)] for name in names),
            )
            for spec in choices[names[0]]
            if all(spec in choices[name] for name in names)
        ]
        if not candidates:
            raise PlanError(f"{names[0]}: {engine} has no format that fits its size; keep it (--keep {names[0]})")
        groups.append(Group(tuple(names), tuple(candidates)))
    return groups


def _together(weight: Weight) -> str:
    if weight.role == "expert":
        return f"experts of block {weight.block}"
    return weight.fused or weight.tensor


def _scheme_name(spec: QuantSpec, asked: Scheme) -> str:
    group = spec.granularity.cols
    kind = "" if spec.symmetric else "_ASYM"
    size = "_CHANNEL" if group is None else "" if group == 128 else f"_G{group}"
    activations = "A16" if asked.input is None else f"A{asked.input.format.bits}"
    return f"W{spec.format.bits}{activations}{kind}{size}"


def _measured(
    plan: Plan,
    layers: dict[str, StoredLayer],
    choices: dict[str, list[QuantSpec]],
    cache: Path | None,
    engine: str,
    bits: float,
    device: str,
    progress: Progress,
) -> dict[str, list[float]]:
    assert plan.calibration is not None
    ids = plan.calibration.ids[:SENSITIVITY_WINDOWS]
    key = _key(plan, choices, ids)
    if cache is not None and cache.exists():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known["costs"]
    where = resolve_device(device)
    progress.start(sum(x.elements for x in layers.values()), "weights", f"weigh the layers of {plan.source.name}")
    try:
        with streamed(plan, where) as (stream, pool):
            costs = measure_costs(
                stream, ids.split(_BATCH), layers, lambda layer: choices[layer.tensor], pool, progress.advance
            )
    finally:
        progress.finish()
    for name in layers:  # blocks that text does not run through: nothing is known, so nothing may be saved on them
        costs.setdefault(name, [-float(spec.format.bits) for spec in choices[name]])
    if cache is not None:
        data = json.dumps({"key": key, "costs": costs}).encode()
        replace_file(cache, data, cache.with_name(cache.name + ".part"))
    return costs


def _key(plan: Plan, choices: dict[str, list[QuantSpec]], ids: torch.Tensor) -> str:
    described = {name: [spec.describe() for spec in specs] for name, specs in choices.items()}
    told: Sequence[Any] = (described, plan.checkpoint.fingerprint(), ids.tolist())
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
