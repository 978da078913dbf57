"""Solving with saved statistics: every layer by itself, with the moments that `pipeline.statistics` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.calibration.statistics import LayerStatistics, layer_key, whole_key
from bitgrain.calibration.statistics_file import StatisticsFile
from bitgrain.models.anatomy import Weight
from bitgrain.pipeline.blockwise.columns import columns_of, needs_inputs
from bitgrain.pipeline.blockwise.layer import record_of, solve_layer, wants_moments
from bitgrain.pipeline.blockwise.static import Chosen, choose_input, require_reached, static_layers, stored_inputs
from bitgrain.pipeline.experts import experts_of, needs_whole, note_for, saved_tokens, settle, told_of, told_of_model
from bitgrain.pipeline.layers import kept, outer_scales, to_cpu
from bitgrain.pipeline.plan import Plan, Unit
from bitgrain.pipeline.statistics import group_key
from bitgrain.recipes import Experts
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments, get_solver


def solve_saved_unit(
    plan: Plan, unit: Unit, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The output tensors of a unit, and what is to be known of each quantized layer.

    The same bytes as from a job with `activations: full` on the text of the statistics. Raises StatisticsError
    (damaged, or without what a range needs), PlanError (a static scale for a layer that calibration never reached).
    """
    assert plan.statistics is not None
    weights = {weight.tensor: weight for weight in plan.anatomy.weights}
    layers = {name: plan.quantized[name] for name in unit.tensors if name in plan.quantized}
    outer = outer_scales(layers, plan.fused_groups, plan.checkpoint.read, device)
    inputs = _inputs(plan, plan.statistics, weights, list(layers))
    outputs: dict[str, Tensor] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in unit.tensors:
        layer = layers.get(name)
        if layer is None:
            outputs[name] = kept(plan.checkpoint, name)
            continue
        weight, original = weights[name], plan.checkpoint.read(name)
        places: Sequence[int | None] = range(layer.experts) if layer.experts > 1 else [weight.expert]
        keys = [Key(_parameter(weight), place) for place in places]
        wanted = weight.role != "embedding" and wants_moments(plan, weight)
        experts = plan.recipe.experts if weight.role == "expert" else None
        saved = _Saved(plan.statistics, device, experts, layer.in_features)
        moments: Mapping[Key, Moments] = saved if wanted else {}
        solver = get_solver("rtn" if weight.role == "embedding" else plan.recipe.solver)
        seen = _of_inputs(plan.statistics, weight) if needs_inputs(layer) else None
        columns = columns_of(layer, original, seen)
        notes = saved.notes(keys) if wanted else {}
        chosen = (solver, None, outer.get(name), device, columns, notes)
        solutions = solve_layer(layer, original, moments, keys, *chosen)
        told: dict[str, Any] = dict(inputs[name].record) if name in inputs else {}
        if wanted and experts is not None:
            tokens = [saved.tokens(key) for key in keys]
            told["experts"] = told_of(experts, tokens, experts.threshold(layer.in_features))
        records[name] = {**record_of(layer, original, solutions), **told}
        parts = [to_cpu(solution.q) for solution in solutions]
        outputs.update(plan.layout.encode(layer, parts, stored_inputs(layer, inputs)))
    return outputs, records


def saved_record(plan: Plan) -> dict[str, Any]:
    """What the manifest says of a job with saved statistics."""
    assert plan.statistics is not None
    about = plan.statistics.about
    told: dict[str, Any] = {"calibration": {**about.text, "statistics": dict(about.settings)}}
    members = experts_of(weight for weight in plan.anatomy.weights if weight.tensor in plan.quantized)
    if wants_moments(plan) and members:
        tokens = saved_tokens(members, plan.statistics.all_tokens)
        told["experts"] = told_of_model(plan.recipe.experts, members, tokens)
    return told


class _Saved(Mapping[Key, Moments]):
    """Moments out of the file, read when they are asked for; those of experts as the policy `experts` wants them."""

    def __init__(
        self, statistics: StatisticsFile, device: torch.device, experts: Experts | None, in_features: int
    ) -> None:
        self._statistics, self._device, self._experts, self._in_features = statistics, device, experts, in_features

    def __getitem__(self, key: Key) -> Moments:
        name, experts = layer_key(key.name, key.expert), self._experts
        known = self._read(name)
        if experts is not None:
            wanted = needs_whole(experts, self.tokens(key), self._in_features)
            known = settle(experts, known, self._read(whole_key(name)) if wanted else None, self._in_features)
        if known is None:
            raise KeyError(key)
        return known

    def tokens(self, key: Key) -> int:
        """How many reached it."""
        name = layer_key(key.name, key.expert)
        return self._statistics.tokens(name) if name in self._statistics else 0

    def notes(self, keys: Sequence[Key]) -> dict[Key, str]:
        """What is to be told of experts."""
        found: dict[Key, str] = {}
        if self._experts is not None:
            for key in keys:
                whole = whole_key(layer_key(key.name, key.expert)) in self._statistics
                if note := note_for(self._experts, self.tokens(key), whole, self._in_features):
                    found[key] = note
        return found

    def _read(self, name: str) -> Moments | None:
        if name not in self._statistics:
            return None
        moments = self._statistics.read(name).moments
        return Moments(moments.hessian.to(self._device), moments.tokens)

    def __iter__(self) -> Iterator[Key]:
        raise TypeError("moments are read one by one")

    def __len__(self) -> int:
        return len(self._statistics.keys)


def _parameter(weight: Weight) -> str:
    return weight.targets[0] if weight.block is not None else weight.memory


def _inputs(
    plan: Plan, statistics: StatisticsFile, weights: Mapping[str, Weight], names: Sequence[str]
) -> dict[str, Chosen]:
    """The static scales of layers, each chosen together with all that read the same inputs."""
    found: dict[str, Chosen] = {}
    for name in static_layers(plan.quantized, names):
        if name in found:
            continue
        key = _static_key(statistics, weights[name])
        if key is None:
            require_reached([name])
            continue
        place, spec = statistics.place(key), plan.quantized[name].static_input
        sharers = [
            other
            for other in static_layers(plan.quantized, plan.quantized)
            if plan.quantized[other].static_input == spec
            and (theirs := _static_key(statistics, weights[other])) is not None
            and statistics.place(theirs) == place
        ]
        chosen = choose_input(statistics.read(key), sharers, plan.quantized, plan.checkpoint.read)
        found.update(dict.fromkeys(sharers, chosen))
    return found


def _of_inputs(statistics: StatisticsFile, weight: Weight) -> LayerStatistics | None:
    """Of all inputs that matrices with one input quantizer read; None where calibration never came by."""
    key = _static_key(statistics, weight)
    return None if key is None else statistics.read(key)


def _static_key(statistics: StatisticsFile, weight: Weight) -> str | None:
    parameter = _parameter(weight)
    return next((key for key in (group_key(parameter), parameter) if key in statistics), None)
