"""Making a plan of a recipe and a model: only headers and configs are read, and all problems are collected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bitgrain.calibration.statistics_file import open_statistics
from bitgrain.checkpoints.content import content_sha256
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import get_layout
from bitgrain.checkpoints.reader import Checkpoint, open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec, plan_shards
from bitgrain.errors import PlanError, SchemeError
from bitgrain.models.anatomy import Anatomy, Weight, read_anatomy
from bitgrain.models.naming import StoredTensor, natural_order
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QuantSpec
from bitgrain.pipeline.cache_plan import CachePlan, plan_cache
from bitgrain.pipeline.clusters import cluster_problems
from bitgrain.pipeline.cost import cost_notes
from bitgrain.pipeline.engines import judge
from bitgrain.pipeline.plan import CACHE_UNIT, Plan, PlannedLayer, Unit, needs_bfloat16
from bitgrain.pipeline.plan_text import (
    experts_not_by_statistics,
    experts_note,
    findings,
    learns_from_inputs,
    needs_text,
    not_by_statistics,
    read_calibration,
    read_training,
    statistics_note,
)
from bitgrain.recipes import Recipe, Scheme
from bitgrain.recipes.kv_cache import read_cache
from bitgrain.recipes.steps import read_step
from bitgrain.runtime.convolutions import check_inputs

DEFAULT_SHARD_BYTES = 5_000_000_000
_UNIT_BYTES = 64_000_000
"""About how many source bytes are one unit of work: what is lost by a kill, and what one worker holds."""


def make_plan(
    model: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int | None = None,
    calibrate: bool = False,
    solved: bool = False,
    statistics: str | Path | None = None,
    notes: Sequence[str] = (),
    layout: str | None = None,
) -> Plan:
    """Plan `recipe` on `model` (a folder or a hub name).

    calibrate  read calibration text even if nothing in the recipe needs it; notes: what else the plan should tell
    solved     read none: the caller brings what the recipe would lead to
    statistics a folder that `bitgrain calibrate` wrote, used in place of text
    layout     how the files are laid out (`checkpoints.layouts`); None: compressed-tensors, or bitgrain's own where
               that cannot hold everything

    Problems are collected in the plan, so that all are seen at once. Raises ModelError and CheckpointError for a model
    that cannot be read, RecipeError for a rule that matches nothing, StatisticsError for statistics of another model.
    """
    wanted = None if layout is None else get_layout(layout)
    if workers is not None and workers < 1:
        raise PlanError(f"{workers} workers cannot do anything; ask for at least 1")
    source = resolve_model(model, revision=revision)
    config = load_config(source, trust_remote_code)
    checkpoint = open_checkpoint(source.path)
    skeleton = build_skeleton(config, trust_remote_code)
    anatomy = read_anatomy(skeleton, checkpoint.entries)
    schemes = recipe.assign(anatomy.weights)
    recipe = recipe.for_schemes(schemes)
    saved = None if statistics is None else open_statistics(statistics, model=content_sha256(checkpoint))
    calibration = training = None
    if not solved and saved is None:
        training = read_training(recipe, source, config, trust_remote_code)
    if not solved and saved is None and (calibrate or recipe.needs_calibration or needs_text(recipe, schemes)):
        calibration = read_calibration(recipe, source, config, trust_remote_code, training)
    problems: list[str] = not_by_statistics(recipe) if saved is not None else []
    if anatomy.missing:
        problems.append(f"{len(anatomy.missing)} parameters of the model are not in its files: {_few(anatomy.missing)}")
    problems.extend(
        f"{name} is stored as {checkpoint.entries[name].dtype}: only float weights can be quantized"
        for name in _integer_weights(skeleton, anatomy, checkpoint)
    )
    layers = [
        _plan_layer(weight, scheme, checkpoint.entries[weight.tensor], recipe, wanted, problems)
        for weight, scheme in zip(anatomy.weights, schemes, strict=True)
    ]
    problems.extend(_different_columns(layers))
    if not any(planned.layer for planned in layers):
        problems.append("no layer would be quantized")
    problems.extend(cluster_problems([(planned.weight, planned.layer) for planned in layers], recipe))
    chosen, reasons = _choose_layout([p.layer for p in layers if p.layer], recipe, wanted, problems)
    quantized = {planned.weight.tensor: planned.layer for planned in layers if planned.layer}
    cache: CachePlan | None = None
    if recipe.kv_cache is not None:
        try:
            dtype = checkpoint.entries[anatomy.weights[0].tensor].dtype
            cache = plan_cache(read_cache(recipe.kv_cache), skeleton, anatomy, dtype)
        except PlanError as error:
            problems.append(str(error))
    outputs = [
        spec for name in natural_order(checkpoint.entries) for spec in _outputs(name, quantized, chosen, checkpoint)
    ]
    if cache is not None:
        outputs += cache.tensors
    plan = Plan(
        source=source,
        config=config,
        checkpoint=checkpoint,
        anatomy=anatomy,
        recipe=recipe,
        layers=tuple(layers),
        layout=chosen,
        shards=plan_shards(outputs, max_shard_bytes),
        units=(*_split(anatomy, checkpoint), *([Unit(CACHE_UNIT, (), 0)] if cache is not None else [])),
        engines=tuple(judge(list(quantized.values()), _fused(layers), chosen.name)),
        workers=torch.get_num_threads() if workers is None else workers,
        problems=tuple(dict.fromkeys(problems)),
        notes=(*notes, *_notes(anatomy, layers, reasons), *(calibration.notes if calibration else ())),
        trust_remote_code=trust_remote_code,
        calibration=calibration,
        training=training,
        statistics=saved,
        cache=cache,
    )
    experts = [p.weight for p in layers if p.layer is not None and p.weight.role == "expert"]
    if not learns_from_inputs(recipe, quantized.values()):
        experts = []
    if saved is not None:
        told = experts_note(recipe, saved, experts) if experts else []
        lacking = experts_not_by_statistics(recipe, saved, experts)
        notes = (*plan.notes, statistics_note(saved), *told)
        return replace(plan, notes=notes, problems=(*plan.problems, *lacking))
    if calibration is None:
        return plan
    told = [*cost_notes(plan), *findings(calibration, recipe, quantized.values())]
    told += experts_note(recipe, None, experts) if experts else []
    return replace(plan, notes=(*plan.notes, *told))


def _integer_weights(skeleton: nn.Module, anatomy: Anatomy, checkpoint: Checkpoint) -> list[str]:
    """Matrices of integers that are no buffers of the model: codes of a format that config.json does not tell of."""
    buffers = {name.rpartition(".")[2] for name, buffer in skeleton.named_buffers() if not buffer.is_floating_point()}
    return [
        name
        for name in anatomy.others
        if not checkpoint.entries[name].dtype.is_floating_point
        and len(checkpoint.entries[name].shape) >= 2
        and name.rpartition(".")[2] not in buffers
    ]


def _plan_layer(
    weight: Weight,
    scheme: Scheme | None,
    entry: StoredTensor,
    recipe: Recipe,
    layout: Layout | None,
    problems: list[str],
) -> PlannedLayer:
    if scheme is None:
        return PlannedLayer(weight, None)
    dtype = entry.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        problems.append(f"{weight.tensor} is stored as {dtype}: only float weights can be quantized")
        return PlannedLayer(weight, None)
    if weight.role == "embedding" and scheme.input is not None:
        problems.append(
            f"{weight.module}: {scheme.name} would quantize token ids; give embeddings a weight-only scheme"
        )
    if weight.role == "conv":
        problems.extend(_not_for_convolutions(weight, scheme, recipe))
    scheme, note = scheme.for_dtype(dtype), ""
    if layout is not None and layout.storages and scheme.weight.scale not in layout.storages:
        scheme = replace(scheme, weight=scheme.weight.with_scale_dtype(layout.storages[0]))
    reason = scheme.indivisible(weight.out_features, weight.in_features)
    if reason:
        note = f"{scheme.name}: {reason}"
        match recipe.on_indivisible:
            case "skip":
                return PlannedLayer(weight, None, f"kept, {note}")
            case "channel":
                try:
                    scheme = scheme.by_channel()
                except SchemeError as error:
                    problems.append(f"{weight.module}: {reason}; {error}")
            case "pad":
                pass
            case "error":
                problems.append(f"{weight.module}: {reason}; choose --on-indivisible pad, channel or skip")
    layer = StoredLayer(
        tensor=weight.tensor,
        module=weight.module,
        memory_module=weight.memory_module,
        class_name=weight.class_name,
        role=weight.role,
        out_features=weight.out_features,
        in_features=weight.in_features,
        experts=weight.experts,
        transposed=weight.transposed,
        dtype=dtype,
        scheme=scheme,
        original=tuple(entry.shape) if weight.role == "conv" else (),
    )
    near = None if layout is None or layout.refusal(layer) is None else _near(layer, layout)
    if layout is not None and near is not None:
        layer = replace(layer, scheme=replace(layer.scheme, weight=near))
        note = "; ".join([*([note] if note else []), f"{near.describe()}, which {layout.name} holds"])
    return PlannedLayer(weight, layer, note)


def _near(layer: StoredLayer, layout: Layout) -> QuantSpec | None:
    """The nearest spec of as many bits that the layout holds in the place of one that it refuses, or None."""
    for spec in layout.spellings(layer):
        same = spec.format.bits == layer.scheme.weight.format.bits
        if same and layout.refusal(replace(layer, scheme=replace(layer.scheme, weight=spec))) is None:
            return spec
    return None


def _different_columns(layers: Sequence[PlannedLayer]) -> list[str]:
    """Problems of matrices that share one input quantizer and would each keep columns of their own."""
    fill = Counter(target for planned in layers for target in planned.weight.targets)
    return [
        f"{planned.weight.module}: it shares its quantized inputs with other matrices, so columns cannot be chosen by "
        "weight; choose them by activation or random"
        for planned in layers
        if planned.layer is not None
        and planned.layer.scheme.input is not None
        and (choice := planned.layer.scheme.weight.columns) is not None
        and choice.by == "weight"
        and (planned.layer.experts > 1 or any(fill[target] > 1 for target in planned.weight.targets))
    ]


def _not_for_convolutions(weight: Weight, scheme: Scheme, recipe: Recipe) -> Iterator[str]:
    if recipe.needs_calibration or scheme.needs_calibration:
        yield (
            f"{weight.module} is a convolution, which text does not calibrate: give it a scheme with dynamic "
            "activations and solver rtn, or calibrate the module in memory (bitgrain.calibrate, quantize_)"
        )
    if scheme.weight.columns is not None:
        yield f"{weight.module} is a convolution, whose columns are no channels: keep none of them in 16 bits"
    if scheme.input is not None:
        try:
            check_inputs(scheme.input, weight.module)
        except SchemeError as error:
            yield str(error)


def _choose_layout(
    layers: Sequence[StoredLayer], recipe: Recipe, wanted: Layout | None, problems: list[str]
) -> tuple[Layout, list[str]]:
    """The layout that is wanted; else compressed-tensors if it can hold every layer, else bitgrain's own, and why."""
    first, own = get_layout("compressed-tensors") if wanted is None else wanted, get_layout("bitgrain")
    reasons = [reason for layer in layers if (reason := first.refusal(layer))]
    steps = [read_step(step) for step in recipe.transforms if first.name != own.name]
    reasons += [f"{step.name} rotates inputs at run time, which others would not do" for step in steps if step.online]
    if not reasons and wanted is not None and layers:
        try:
            wanted.config(layers, [])
        except SchemeError as error:
            reasons.append(str(error))
    if not reasons:
        return first, []
    if wanted is not None:
        problems.extend(reasons)
        return wanted, []
    problems.extend(reason for layer in layers if (reason := own.refusal(layer)))
    return own, reasons


def _outputs(name: str, quantized: dict[str, StoredLayer], layout: Layout, checkpoint: Checkpoint) -> list[TensorSpec]:
    """The tensors on disk that the source's tensor `name` becomes."""
    if name in quantized:
        layer = quantized[name]  # a layer that was refused is a problem of the plan, whose size is shown all the same
        return (layout if layout.refusal(layer) is None else get_layout("bitgrain")).tensors(layer)
    entry = checkpoint.entries[name]
    return [TensorSpec(name, entry.dtype, entry.shape)]


def _split(anatomy: Anatomy, checkpoint: Checkpoint) -> tuple[Unit, ...]:
    """Units of work: parts of one block, about `_UNIT_BYTES` each, that never part a fused group."""
    group_of = {weight.tensor: weight.fused or weight.tensor for weight in anatomy.weights}
    bundles: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for name in natural_order(checkpoint.entries):
        bundles[anatomy.block_of[name], group_of.get(name, name)].append(name)
    units: list[Unit] = []
    parts = Counter[int | None]()
    current: list[str] = []
    where: int | None = None

    def close() -> None:
        if current:
            label = "outside the blocks" if where is None else f"block {where}"
            nbytes = sum(checkpoint.entries[name].nbytes for name in current)
            units.append(Unit(f"{label}, part {parts[where]}", tuple(current), nbytes))
            parts[where] += 1
            current.clear()

    for (block, _), names in sorted(bundles.items(), key=lambda item: -1 if item[0][0] is None else item[0][0]):
        size = sum(checkpoint.entries[name].nbytes for name in names)
        held = sum(checkpoint.entries[name].nbytes for name in current)
        if block != where or (current and held + size > _UNIT_BYTES):
            close()
        where = block
        current.extend(names)
    close()
    return tuple(units)


def _fused(layers: Sequence[PlannedLayer]) -> list[tuple[str, list[StoredLayer | None]]]:
    groups: dict[str, list[StoredLayer | None]] = defaultdict(list)
    for planned in layers:
        if planned.weight.fused:
            groups[planned.weight.fused].append(planned.layer)
    return list(groups.items())


def _notes(anatomy: Anatomy, layers: Sequence[PlannedLayer], reasons: list[str]) -> tuple[str, ...]:
    notes: list[str] = []
    if reasons:
        more = f" (and {len(reasons) - 1} more such layers)" if len(reasons) > 1 else ""
        notes.append(f"written in the bitgrain layout, because {reasons[0]}{more}")
    changed = [planned for planned in layers if planned.note]
    if changed:
        notes.append(
            f"{len(changed)} layers do not get the scheme as asked: {changed[0].weight.module}: {changed[0].note}"
        )
    if anatomy.unexpected:
        notes.append(
            f"{len(anatomy.unexpected)} tensors are unknown to the model and copied: {_few(anatomy.unexpected)}"
        )
    if needs_bfloat16(planned.layer for planned in layers if planned.layer):
        notes.append("config.json says bfloat16: engines decode FP4 to 16 bits and cannot run it in a float32 model")
    roles = Counter(planned.weight.role for planned in layers if planned.layer is None and not planned.note)
    kept = ", ".join(f"{count} {role}" for role, count in roles.items())
    if kept:
        notes.append(f"kept in full precision: {kept}")
    return tuple(notes)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
