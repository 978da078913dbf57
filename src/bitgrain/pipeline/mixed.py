"""Mixed precision at a fixed average: which layer gets how many bits, decided by what each choice is predicted to cost.

The result is a recipe with one rule for each layer, so everything after it (plan, job, resume) is as for any other
recipe, and it can be read, changed and used again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.pipeline.plan import Plan
from bitgrain.pipeline.planning import make_plan
from bitgrain.pipeline.weigh import chosen_together, given_a_scheme, weigh
from bitgrain.progress import Progress
from bitgrain.recipes import Recipe, Scheme, make_recipe
from bitgrain.recipes.recipe import Rule
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.search.budget import Candidate, Group, allocate, least_bits
from bitgrain.search.candidates import candidate_specs


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

    recipe    its scheme says how activations are quantized; its rules which layers are kept, included (the head,
              embeddings) or have a scheme already (their bits count inside the blocks); its calibration is used
    engine    whose candidates there are to choose from (`search.candidates`); settings: as for `make_plan`
    cache     see `pipeline.weigh`
    Raises PlanError for a budget below the least possible, SchemeError for an unknown engine, what `make_plan` raises.
    """
    draft = make_plan(model, recipe, calibrate=True, **settings)
    given = given_a_scheme(draft)
    layers = {name: layer for name, layer in draft.quantized.items() if name not in given}
    if not layers:
        raise PlanError("the recipe's rules leave no layer whose bits could be chosen")
    if any(layer.scheme.weight.columns is not None for layer in layers.values()):
        raise PlanError("--bits weighs codes alone: give it a scheme that keeps no columns, or leave it out")
    block_of = draft.anatomy.block_of
    fixed = [layer for name, layer in draft.quantized.items() if name in given and block_of[name] is not None]
    choices = {name: _specs(layer, engine, bits) for name, layer in layers.items()}
    elements = sum(layer.elements for layer in (*layers.values(), *fixed))
    taken = sum(_size(layer.scheme.weight, layer) for layer in fixed)
    unknown = {name: [0.0] * len(specs) for name, specs in choices.items()}
    least = taken + least_bits(_groups(draft, layers, choices, unknown, engine))
    if least > int(bits * elements):  # said before anything is measured
        raise PlanError(f"{bits:g} bits a weight are less than is possible here, {least / elements:.3f}: raise --bits")
    costs = weigh(draft, layers, choices, device=device, cache=cache, progress=progress).weights
    for name in layers:  # where text does not run through nothing is known, so nothing may be saved
        costs.setdefault(name, [-float(spec.format.bits) for spec in choices[name]])
    groups = _groups(draft, layers, choices, costs, engine)
    found = allocate(groups, int(bits * elements) - taken)
    rules = list(recipe.rules)
    used = Counter[str]()
    for group, candidate in zip(groups, found.chosen, strict=True):
        for name in group.members:
            layer = layers[name]
            scheme = _scheme(candidate.choice, layer.scheme)
            rules.append(Rule(match=layer.module, scheme=SchemeModel.of(scheme)))
            used[scheme.name] += layer.elements
    for layer in fixed:
        used[layer.scheme.name] += layer.elements
    average = (found.bits + taken) / elements
    shares = ", ".join(f"{name} {count / elements:.0%}" for name, count in sorted(used.items()))
    notes = (f"{average:.3f} bits a weight allocated by sensitivity (16-bit scales): {shares}",)
    mixed = make_recipe(**{**recipe.model_dump(), "rules": [rule.model_dump() for rule in rules]})
    return Mix(mixed, average, found.cost, notes)


def _specs(layer: StoredLayer, engine: str, bits: float) -> list[QuantSpec]:
    storage = layer.scheme.weight.scale
    plain = storage if storage in (FP32, FP16, BF16) else FP32
    return candidate_specs(engine, layer.shape, around=bits, scale=plain, role=layer.role)


def _size(spec: QuantSpec, layer: StoredLayer) -> int:
    return layer.experts * spec.with_scale_dtype(FP16).count_bits(layer.shape)


def _groups(
    plan: Plan,
    layers: Mapping[str, StoredLayer],
    choices: Mapping[str, Sequence[QuantSpec]],
    costs: Mapping[str, Sequence[float]],
    engine: str,
) -> list[Group[QuantSpec]]:
    groups: list[Group[QuantSpec]] = []
    for names in chosen_together(plan, layers):
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
            raise PlanError(f"{names[0]}: {engine} has no format that fits it; keep it (--keep {names[0]})")
        groups.append(Group(tuple(names), tuple(candidates)))
    return groups


def _scheme(spec: QuantSpec, asked: Scheme) -> Scheme:
    for name, known in GGUF_TYPES.items():
        if spec == known:
            return Scheme(name, spec, asked.input, prescribed=True)
    return Scheme(_scheme_name(spec, asked), spec, asked.input)


def _scheme_name(spec: QuantSpec, asked: Scheme) -> str:
    group = spec.granularity.cols
    kind = "" if spec.symmetric else "_ASYM"
    size = "_CHANNEL" if group is None else "" if group == 128 else f"_G{group}"
    activations = "A16" if asked.input is None else f"A{asked.input.format.bits}"
    return f"W{spec.format.bits}{activations}{kind}{size}"
