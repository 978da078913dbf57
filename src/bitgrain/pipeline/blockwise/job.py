"""All blocks of a plan, resumable: captured, solved, and given back unit by unit for the files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitgrain.calibration.doctor import examine
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import ModelError
from bitgrain.models.stream import StreamedModel, share_calls
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.block import BlockSolver, Flow, SolvedBlock
from bitgrain.pipeline.blockwise.cache import saved_scales
from bitgrain.pipeline.blockwise.columns import columns_of
from bitgrain.pipeline.blockwise.layer import UNREACHED, loss_note, record_of, solve_layer
from bitgrain.pipeline.blockwise.outside import solve_outside
from bitgrain.pipeline.blockwise.rewrite import PROBE
from bitgrain.pipeline.blockwise.static import require_reached, static_layers, stored_inputs
from bitgrain.pipeline.blockwise.streamed import streamed
from bitgrain.pipeline.blockwise.train import train_whole
from bitgrain.pipeline.blockwise.whole import tune_whole
from bitgrain.pipeline.blockwise.work import (
    FINISHED,
    OUTSIDE,
    TRAINED,
    TUNED,
    Work,
    block_file,
    hidden_file,
    latent_file,
)
from bitgrain.pipeline.layers import kept, outer_scales, to_cpu
from bitgrain.pipeline.plan import CACHE_UNIT, Plan, Unit
from bitgrain.progress import Progress
from bitgrain.runtime.kv_cache.observe import ObservingCache
from bitgrain.runtime.memory import return_freed_memory
from bitgrain.runtime.watch import Key
from bitgrain.solvers import get_solver


def solve_blockwise(plan: Plan, work: Work, device: torch.device, progress: Progress) -> None:
    """Solve every layer of a calibrated plan; what was found is in `work`, read by `solved_unit`.

    Killed at any moment, it goes on at the block where it was. Progress is counted in weights. Raises NumericsError
    (NaN, Inf in weights or activations), ModelError (a model that cannot run block by block).
    """
    if work.has(FINISHED):
        return
    total, done = 0, 0
    for name, layer in plan.quantized.items():
        block = plan.anatomy.block_of[name]
        total += layer.elements
        done += layer.elements if work.has(OUTSIDE if block is None else block_file(block)) else 0
    progress.start(total, "weights", f"quantize {plan.source.name}", done=done)
    return_freed_memory()
    try:
        with streamed(plan, device) as (stream, pool):
            _Pass(plan, work, stream, pool, progress).run()
    finally:
        progress.finish()


def solved_unit(plan: Plan, unit: Unit, work: Work) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The output tensors of a unit from what `solve_blockwise` left, and what is to be known of each layer."""
    if unit.name == CACHE_UNIT:
        assert plan.cache is not None
        return saved_scales(plan.cache, work), {}
    block = plan.anatomy.block_of[unit.tensors[0]]
    file = OUTSIDE if block is None else block_file(block)
    solved, records = work.keys(file), work.record(file)["layers"]
    tensors: dict[str, Tensor] = {}
    for name in unit.tensors:
        layer = plan.quantized.get(name)
        if layer is not None:
            tensors.update(work.tensors(file, [spec.name for spec in plan.layout.tensors(layer)]))
        elif name in solved:
            tensors.update(work.tensors(file, [name]))
        else:
            tensors[name] = kept(plan.checkpoint, name)
    for above in (TUNED, TRAINED):
        tensors.update(work.tensors(above, list(tensors)) if work.has(above) else {})
    return tensors, {name: records[name] for name in unit.tensors if name in records}


class _Pass:
    """The walk through the blocks."""

    def __init__(self, plan: Plan, work: Work, stream: StreamedModel, pool: Pool, progress: Progress) -> None:
        self.plan, self.work, self.stream, self.pool, self.progress = plan, work, stream, pool, progress
        assert plan.calibration is not None
        self.ids = list(plan.calibration.ids.split(plan.recipe.calibration.batch))

    def run(self) -> None:
        count = len(self.stream.anatomy.block_names)
        solver = BlockSolver(self.plan, self.stream, self.pool, self.progress.advance)
        outside, told_outside = solver.rewriter.outside()
        first = next((i for i in range(count) if not self.work.has(block_file(i))), count)
        for index in range(first):
            figures = self.work.record(block_file(index))["transforms"]
            solver.rewriter.go_on(index, figures, lambda parameter, index=index: self._order(index, parameter))
        flow = self._start(first)
        tuning = self.plan.recipe.tuning
        for name, wanted in (("end_to_end", tuning.end_to_end), ("training", tuning.training)):
            if wanted is not None and not self.stream.predicts_tokens:
                raise ModelError(f"{self.plan.anatomy.architecture} predicts no tokens; leave tuning.{name} out")
        beyond = set(range(count)) - flow.batches[0].calls.keys()
        weights = [weight for weight in self.stream.anatomy.weights if weight.tensor in self.plan.quantized]
        require_reached(static_layers(self.plan.quantized, [one.tensor for one in weights if one.block in beyond]))
        for index in range(first, count):
            if index in flow.batches[0].calls:
                solved = solver.solve(index, flow)
                self.work.save(hidden_file(index + 1), _hidden(flow))
            else:
                solved = self._unreached(index)
                if self.work.has(hidden_file(index)):
                    self.work.save(hidden_file(index + 1), _hidden(flow))
            self._save(block_file(index), solved)
            self.work.remove(hidden_file(index))
        if not self.work.has(OUTSIDE):
            advance = self.progress.advance
            solved = solve_outside(self.plan, self.stream, flow, self.ids, self.pool, advance, outside)
            solved.transforms = told_outside
            self._save(OUTSIDE, solved)
        self.progress.finish()
        assert self.plan.calibration is not None
        told: dict[str, Any] = {"calibration": self.plan.calibration.description}
        experts: dict[str, dict[str, Any]] = {}
        for index in range(count):
            experts |= self.work.record(block_file(index)).get("experts", {})
        notes = (self.plan.notes, solver.rewriter.left_out, self._in_place(count), self._findings(experts))
        told["notes"] = [note for some in notes for note in some]
        if experts:
            told["experts"] = experts
        if self.plan.recipe.transforms:
            files = [OUTSIDE, *(block_file(i) for i in range(count))]
            told["transforms"] = {file: self.work.record(file).get("transforms", []) for file in files}
            told["online_rotations"] = self._rotations(count)
            told["reordered_norms"] = self._norms(count)
        if self.plan.cache is not None:
            scales = saved_scales(self.plan.cache, self.work)
            scheme = self.plan.cache.scheme
            told["kv_cache"] = {
                "keys": scheme.keys.describe(),
                "values": scheme.values.describe(),
                "scales": {name: float(scale) for name, scale in scales.items()},
            }
        if tuning.end_to_end is not None:
            if not self.work.has(TUNED):
                tensors, figures = tune_whole(self.plan, self.work, self.stream, flow.full, self.progress)
                self.work.save(TUNED, tensors, figures)
            told["tuning"] = self.work.record(TUNED)
        flow.full.clear()
        if tuning.training is not None:
            found = told["training"] = train_whole(self.plan, self.work, self.stream, self.progress)
            if "stopped" in found:
                told["notes"] += [f"{found['stopped']}; the state of step {found['best_step']} is what is written"]
        changed = self._changed(count)
        self.work.save(FINISHED, {}, {**told, "changed": changed} if changed else told)
        self.work.remove(hidden_file(count))

    def _rotations(self, count: int) -> dict[str, dict[str, int]]:
        """What is to be computed at run time, by the module's path."""
        found: dict[str, dict[str, int]] = {}
        for index in range(count):
            prefix = self.plan.anatomy.block_names[index] + "."
            for figures in self.work.record(block_file(index)).get("transforms", []):
                found |= {prefix + path: settings for path, settings in figures.get("online", {}).items()}
        return found

    def _norms(self, count: int) -> dict[str, str]:
        """The paths of the norms that write their channels in another order -> the tensor that has it."""
        found: dict[str, str] = {}
        for index in range(count):
            prefix = self.plan.anatomy.block_names[index] + "."
            for figures in self.work.record(block_file(index)).get("transforms", []):
                norms: dict[str, str] = figures.get("norms", {})
                found |= {prefix + path: self._layer(prefix + reader).tensor for path, reader in norms.items()}
        return found

    def _in_place(self, count: int) -> list[str]:
        """A note if clusters had to be made of channels as they lie."""
        names: list[str] = []
        for index in range(count):
            prefix = self.plan.anatomy.block_names[index] + "."
            for figures in self.work.record(block_file(index)).get("transforms", []):
                names += [prefix + reader for reader, how in figures.get("moved", {}).items() if how == "in place"]
        if not names:
            return []
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        return [
            f"the input channels of {names[0]}{more} cannot be reordered: their clusters are runs of neighbours, which "
            "serve less well"
        ]

    def _layer(self, parameter: str) -> StoredLayer:
        """A quantized layer that goes into a parameter, by its name in the model."""
        weights = self.plan.anatomy.weights
        names = (weight.tensor for weight in weights if parameter in weight.targets)
        return next(self.plan.quantized[name] for name in names if name in self.plan.quantized)

    def _order(self, index: int, parameter: str) -> Tensor:
        """The order of its columns, of a parameter of a block that is done."""
        layer = self._layer(f"{self.plan.anatomy.block_names[index]}.{parameter}")
        read = partial(self.work.one, block_file(index))
        (static,) = self.plan.layout.decode_inputs(layer, read)
        assert static.order is not None
        return static.order

    def _changed(self, count: int) -> list[str]:
        """Tensors that are not quantized, and that transforms or tuning gave other values."""
        above = [file for file in (TUNED, TRAINED) if self.work.has(file)]
        files = [OUTSIDE, *(block_file(i) for i in range(count)), *above]
        held = set[str]().union(*(self.work.keys(file) for file in files))
        kept = self.plan.checkpoint.entries.keys() - self.plan.quantized.keys()
        return sorted(held.intersection(kept))

    def _findings(self, experts: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What the doctor says of the experts."""
        assert self.plan.calibration is not None
        found = examine(self.plan.calibration.ids, widest=0, experts=experts)
        return [finding.message for finding in found if finding.message not in self.plan.notes]

    def _start(self, first: int) -> Flow:
        """The calibration text in front of block `first`."""
        recipe = self.plan.recipe
        cache = self.plan.cache
        batches = [
            self.stream.capture(ids, None if cache is None else ObservingCache(cache.scheme, self.plan.config))
            for ids in self.ids
        ]
        share_calls(batches)
        hidden = [batch.hidden for batch in batches]
        sequential = recipe.calibration.activations == "quantized"
        flow = Flow(
            batches,
            quantized=list(hidden) if sequential else [],
            full=list(hidden) if self._needs_full() else [],
        )
        if recipe.transforms:
            assert self.plan.calibration is not None
            flow.probe = self.stream.capture(self.plan.calibration.ids[: PROBE[0], : PROBE[1]])
        if first and self.work.has(hidden_file(first)):
            saved = self.work.tensors(hidden_file(first))
            for name, mine in (("quantized", flow.quantized), ("full", flow.full)):
                mine[:] = [saved[f"{name}.{i}"].to(self.stream.device) for i in range(len(mine))]
            if flow.probe is not None:
                flow.probe.hidden = saved["probe"].to(self.stream.device)
        return flow

    def _needs_full(self) -> bool:
        """Whether the full-precision model's activations are followed through the blocks."""
        recipe = self.plan.recipe
        learns = recipe.tuning.end_to_end is not None or recipe.tuning.blockwise is not None
        return (
            bool(learns or recipe.transforms) or recipe.target is not None or recipe.calibration.activations == "full"
        )

    def _unreached(self, index: int) -> SolvedBlock:
        """A block that text does not run through, as those of a vision tower: rounded without calibration."""
        result = SolvedBlock()
        solver, read = get_solver(self.plan.recipe.solver), self.plan.checkpoint.read
        weights = [weight for weight in self.stream.anatomy.weights if weight.block == index]
        layers = {one.tensor: self.plan.quantized[one.tensor] for one in weights if one.tensor in self.plan.quantized}
        outer = outer_scales(layers, self.plan.fused_groups, read, self.stream.device)
        for weight in weights:
            layer = layers.get(weight.tensor)
            if layer is None:
                continue
            original = read(weight.tensor)
            keys = [Key(weight.memory)] * layer.experts
            scale = outer.get(weight.tensor)
            with single_threaded():
                kept = columns_of(layer, original)
                solutions = solve_layer(layer, original, {}, keys, solver, None, scale, self.stream.device, kept)
            result.parts[weight.tensor] = [solution.q for solution in solutions]
            record = record_of(layer, original, solutions)
            record["notes"] = list(dict.fromkeys([*record["notes"], UNREACHED]))
            result.records[weight.tensor] = record
            self.progress.advance(layer.elements, loss_note(layer.module, solutions))
        return result

    def _save(self, file: str, solved: SolvedBlock) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parts in solved.parts.items():
            layer = self.plan.quantized[name]
            inputs = stored_inputs(layer, solved.inputs)
            tensors.update(self.plan.layout.encode(layer, [to_cpu(q) for q in parts], inputs))
        tensors.update(solved.cache)
        for name, tensor in solved.changed.items():
            if name not in solved.parts:
                tensors[name] = tensor.to(self.plan.checkpoint.entries[name].dtype)
        record: dict[str, Any] = {
            "layers": solved.records,
            "transforms": solved.transforms,
            "experts": solved.experts,
            "rewritten": sorted(self.plan.quantized.keys() & solved.changed.keys()),
        }
        if self.plan.recipe.tuning.training is not None:
            self.work.save(latent_file(file), {name: solved.changed[name] for name in record["rewritten"]})
        self.work.save(file, tensors, record)


def _hidden(flow: Flow) -> dict[str, Tensor]:
    found = {f"quantized.{i}": tensor for i, tensor in enumerate(flow.quantized)}
    found |= {f"full.{i}": tensor for i, tensor in enumerate(flow.full)}
    return found if flow.probe is None else {**found, "probe": flow.probe.hidden}
