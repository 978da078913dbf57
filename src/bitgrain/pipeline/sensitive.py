"""The most sensitive layers, spared: `--keep 2%` and `--fallback 10%`, a share of the weights in place of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError
from bitgrain.pipeline.planning import make_plan
from bitgrain.pipeline.weigh import chosen_together, given_a_scheme, weigh
from bitgrain.progress import Progress
from bitgrain.recipes import Recipe, make_recipe
from bitgrain.recipes.recipe import Rule
from bitgrain.recipes.scheme import eight_bits
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.search.budget import Candidate, Group, allocate


@dataclass(frozen=True)
class Spared:
    """The recipe with a rule for each layer that is spared, and what this is predicted to save."""

    recipe: Recipe
    notes: tuple[str, ...]


def spare_layers(
    model: str | Path,
    recipe: Recipe,
    *,
    keep: float = 0.0,
    fallback: float = 0.0,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress,
    **settings: Any,
) -> Spared:
    """Leave the layers as they are, and give those 8 bits (`recipes.scheme.eight_bits`), that save most.

    keep, fallback  shares of the weights that the recipe quantizes, 0 to 1, which the layers may hold at most
    cache           see `pipeline.weigh`; settings: as for `make_plan`
    What rounding the inputs costs counts for `keep`. Layers that engines join are spared together; those to which a
    rule gives a scheme have it. Raises PlanError where nothing can be chosen, and what `make_plan` raises.
    """
    draft = make_plan(model, recipe, calibrate=True, **settings)
    given = given_a_scheme(draft)
    layers = {name: layer for name, layer in draft.quantized.items() if name not in given}
    if not layers:
        raise PlanError("the recipe's rules leave no layer that could be spared")
    eight = {name: eight_bits(layer.scheme).for_dtype(layer.dtype) for name, layer in layers.items()}
    # columns are not chosen yet: the ranking is that of the codes
    plain = {name: replace(layer.scheme.weight, columns=None) for name, layer in layers.items()}
    choices = {name: [plain[name], eight[name].weight] for name in layers}
    costs = weigh(draft, layers, choices, device=device, cache=cache, progress=progress)
    asked = {name: found[0] + costs.inputs.get(name, 0.0) for name, found in costs.weights.items()}
    groups = [names for names in chosen_together(draft, layers) if all(name in asked for name in names)]
    total = sum(layer.elements for layer in layers.values())
    kept = _chosen(groups, layers, asked, dict.fromkeys(asked, 0.0), int(keep * total))
    left = [names for names in groups if names not in kept]
    safe = {name: found[1] + costs.inputs.get(name, 0.0) for name, found in costs.weights.items()}
    fallen = _chosen(left, layers, asked, safe, int(fallback * total))
    rules = [
        *recipe.rules,
        *(Rule(match=layers[name].module, keep=True) for names in kept for name in names),
        *(Rule(match=layers[name].module, scheme=SchemeModel.of(eight[name])) for names in fallen for name in names),
    ]
    before = sum(asked.values())
    saved = sum(asked[name] for names in kept for name in names)
    saved += sum(asked[name] - safe[name] for names in fallen for name in names)
    notes = [f"predicted KL divergence {before:.5f} nats per token, {before - saved:.5f} with the spared layers"]
    for what, share, chosen in (("kept", keep, kept), ("given 8 bits", fallback, fallen)):
        if share:
            modules = [layers[name].module for names in chosen for name in names]
            part = sum(layers[name].elements for names in chosen for name in names) / total
            notes.append(f"{len(modules)} most sensitive layers, {part:.1%} of the weights, {what}: {_few(modules)}")
    spared = make_recipe(**{**recipe.model_dump(), "rules": [rule.model_dump() for rule in rules]})
    return Spared(spared, tuple(notes))


def _chosen(
    groups: Sequence[list[str]],
    layers: Mapping[str, StoredLayer],
    cost: Mapping[str, float],
    instead: Mapping[str, float],
    budget: int,
) -> list[list[str]]:
    """Those groups, with at most `budget` weights together, whose cost falls most."""
    offered = [
        Group(
            tuple(names),
            (
                Candidate(False, 0, sum(cost[name] for name in names)),
                Candidate(True, sum(layers[name].elements for name in names), sum(instead[name] for name in names)),
            ),
        )
        for names in groups
    ]
    found = allocate(offered, budget)
    return [names for names, candidate in zip(groups, found.chosen, strict=True) if candidate.choice]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
