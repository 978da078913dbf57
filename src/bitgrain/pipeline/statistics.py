"""Calibrate once: one pass of the full-precision model over text, block by block, and what every layer saw on disk.

Sums are taken as by a job with `activations: full`, batch by batch in their order, so that both give the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.calibration.doctor import examine
from bitgrain.calibration.statistics import LayerStatistics, layer_key, whole_key
from bitgrain.calibration.statistics_file import About, StatisticsWriter
from bitgrain.checkpoints.content import content_sha256
from bitgrain.errors import ModelError, NumericsError
from bitgrain.models.anatomy import Weight
from bitgrain.models.stream import Call, Captured, StreamedModel, share_calls
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.outside import inputs_outside
from bitgrain.pipeline.blockwise.runs import Kept, Reruns, Seen
from bitgrain.pipeline.blockwise.spread import whole_moments
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.pipeline.blockwise.static import Observed, Wanted, group_name, merge_observed, observe_inputs
from bitgrain.pipeline.blockwise.streamed import streamed
from bitgrain.pipeline.blockwise.work import Work, hidden_file
from bitgrain.pipeline.cost import HOLD_BYTES, STREAMS
from bitgrain.pipeline.experts import experts_of, needs_whole, require_whole, saved_tokens, told_of_model
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress, make_progress
from bitgrain.runtime.device import resolve_device
from bitgrain.runtime.memory import return_freed_memory
from bitgrain.runtime.watch import Key

ROLES = ("linear", "expert", "router", "lm_head")
"""Of the matrices that have inputs."""


@dataclass(frozen=True)
class Calibrated:
    """Where the statistics are, what they are of, of how many matrices, and what the doctor says."""

    out: Path
    about: About
    layers: int
    notes: tuple[str, ...]


def group_key(parameter: str) -> str:
    """Under which the inputs of experts that engines run as one are kept: what their one static scale is chosen by."""
    return f"{parameter}#together"


def run_calibration(
    plan: Plan, out: str | Path, *, device: str = "auto", progress: Progress | None = None
) -> Calibrated:
    """Write the statistics of every matrix of `plan`'s model on its calibration text into the new folder `out`.

    What the plan would quantize does not matter. Killed at any moment, the same call goes on at the block where it was;
    the result is byte-identical. Progress is counted in weights. Raises PlanError (problems in the plan), OutputError
    (`out` exists), NumericsError (NaN, Inf among the activations), ModelError (a model that cannot run block by block).
    """
    plan.require_possible()
    assert plan.calibration is not None
    where = resolve_device(device)
    progress = progress or make_progress("quiet")
    settings: dict[str, Any] = {"activations": "full", "batch": plan.recipe.calibration.batch, "device": where.type}
    if any(weight.role == "expert" for weight in plan.anatomy.weights):
        settings["experts"] = plan.recipe.experts.model_dump()
    about = About(content_sha256(plan.checkpoint), plan.calibration.description, settings)
    writer = StatisticsWriter(out, about)
    weights = [weight for weight in plan.anatomy.weights if weight.role in ROLES]
    progress.start(sum(weight.elements for weight in weights), "weights", f"calibrate {plan.source.name}")
    return_freed_memory()
    try:
        with streamed(plan, where) as (stream, pool):
            _Walk(plan, weights, stream, pool, progress, writer).run()
        writer.finish()
    except (NumericsError, ModelError):
        shutil.rmtree(writer.partial)
        raise
    finally:
        progress.finish()
    widest = max((weight.in_features for weight in weights), default=0)
    members = experts_of(weights)
    told = told_of_model(plan.recipe.experts, members, saved_tokens(members, writer.tokens))
    found = examine(plan.calibration.ids, widest=widest, experts=told)
    notes = dict.fromkeys([*plan.calibration.notes, *(finding.message for finding in found)])
    return Calibrated(Path(out), about, len(weights), tuple(notes))


class _Walk:
    """The walk through the blocks."""

    def __init__(
        self,
        plan: Plan,
        weights: Sequence[Weight],
        stream: StreamedModel,
        pool: Pool,
        progress: Progress,
        writer: StatisticsWriter,
    ) -> None:
        self.weights, self.stream, self.pool, self.progress, self.writer = weights, stream, pool, progress, writer
        assert plan.calibration is not None
        self.ids = list(plan.calibration.ids.split(plan.recipe.calibration.batch))
        self.windows = [len(ids) for ids in self.ids]
        self.experts = plan.recipe.experts
        (writer.partial / "work").mkdir(exist_ok=True)
        self.work = Work(writer.partial / "work")

    def run(self) -> None:
        batches = [self.stream.capture(ids) for ids in self.ids]
        share_calls(batches)
        blocks = [index for index in range(len(self.stream.anatomy.block_names)) if index in batches[0].calls]
        outside = [weight for weight in self.weights if weight.block is None]
        done = min(self.writer.files, len(blocks))
        hidden = [batch.hidden for batch in batches]
        if done:
            saved = self.work.tensors(hidden_file(done))
            hidden = [saved[str(i)].to(self.stream.device) for i in range(len(hidden))]
            before = [weight for weight in self.weights if weight.block in blocks[:done]]
            self.progress.advance(sum(weight.elements for weight in before), f"{done} blocks were done before")
        for place in range(done, len(blocks)):
            layers, hidden = self._block(blocks[place], hidden, batches)
            self.work.save(hidden_file(place + 1), {str(i): one for i, one in enumerate(hidden)})
            self.writer.add(layers)
            self.work.remove(hidden_file(place))
        for weight in outside[max(0, self.writer.files - len(blocks)) :]:
            self._outside(weight, hidden)

    def _block(
        self, index: int, hidden: Sequence[Tensor], batches: Sequence[Captured]
    ) -> tuple[dict[str, LayerStatistics], list[Tensor]]:
        """The statistics of a block, and its outputs."""
        prefix = self.stream.anatomy.block_names[index] + "."
        weights = [weight for weight in self.weights if weight.block == index]
        block = self.stream.load_block(index)
        calls = [batch.calls[index] for batch in batches]
        names = list(dict.fromkeys(weight.targets[0].removeprefix(prefix) for weight in weights))
        stages = find_stages(block, names, hidden[0], calls[0]) if names else []
        reached = [stage for stage in stages if stage.reached]
        layers: dict[str, LayerStatistics] = {}
        with self._runs(block, hidden, calls, reached, max((w.in_features for w in weights), default=0)) as walk:
            for place, stage in enumerate(reached):
                of_stage = [weight for weight in weights if weight.targets[0].removeprefix(prefix) in stage.names]
                found = self._stage(stage, lambda batch, place=place: walk.seen(batch, place), self.pool, prefix)
                layers |= found | self._whole(block, hidden, calls, stage, of_stage, found, prefix)
                walk.release(place)
                self.progress.advance(sum(weight.elements for weight in of_stage), prefix + stage.names[0])
            outputs = walk.outputs()
        if not all(bool(torch.isfinite(output.sum()).item()) for output in outputs):
            raise NumericsError(f"{prefix.removesuffix('.')}: its output holds NaN or Inf on calibration text")
        self.stream.free_block(index)
        return layers, outputs

    def _runs(
        self, block: nn.Module, hidden: Sequence[Tensor], calls: Sequence[Call], stages: Sequence[Stage], widest: int
    ) -> Kept | Reruns:
        tokens = sum(one.numel() // one.shape[-1] for one in hidden)
        if 4 * tokens * (widest + STREAMS * hidden[0].shape[-1]) > HOLD_BYTES:
            return Reruns(block, hidden, calls, stages, self.pool)
        return Kept(block, hidden, calls, stages)

    def _stage(self, stage: Stage, seen: Callable[[int], Seen], pool: Pool, prefix: str) -> dict[str, LayerStatistics]:
        """The statistics of a stage's matrices; where they share one input, one object."""
        together = not stage.shared
        wanted = Wanted(
            places=lambda key: [_place(key), *([f"{group_name(stage, key.name)}#"] if together else [])],
            histogram=lambda _: True,
            sampled=lambda name: name.endswith("#") == together,
        )
        parts: dict[int, Observed] = {}
        label = prefix.removesuffix(".")

        def noted(batch: int) -> Seen:
            given = seen(batch)
            parts[batch] = observe_inputs(stage, given, wanted, batch, self.windows, label)
            return given

        moments = gather_moments(stage, len(self.ids), noted, None, pool, label)
        observed = merge_observed(parts[batch] for batch in range(len(self.ids)))
        found: dict[str, LayerStatistics] = {}
        for key, known in moments.items():
            source = stage.names[0] if stage.shared else key.name
            place = _place(Key(source, key.expert))
            if observed[place].hessian is None:
                observed[place] = replace(observed[place], hessian=known.hessian)
            found[layer_key(prefix + key.name, key.expert)] = observed[place]
        for name in stage.names if together else ():
            group = f"{group_name(stage, name)}#"
            if group in observed:
                found[group_key(prefix + name)] = observed[group]
        return found

    def _whole(
        self,
        block: nn.Module,
        hidden: Sequence[Tensor],
        calls: Sequence[Call],
        stage: Stage,
        weights: Sequence[Weight],
        own: Mapping[str, LayerStatistics],
        prefix: str,
    ) -> dict[str, LayerStatistics]:
        """What all tokens of their layer would show the experts that want it; `own`: what they saw."""
        label = prefix.removesuffix(".")
        every = (one for layer in experts_of(weights, prefix).values() for one in layer)
        wanted = [
            key
            for one in every
            for key, in_features in one.items()
            if needs_whole(self.experts, own[name].tokens if (name := prefix + _place(key)) in own else 0, in_features)
        ]
        wants = Wanted(lambda key: [_place(key)], histogram=lambda _: False, sampled=lambda _: False)
        parts: dict[str, dict[int, Observed]] = {}

        def noted(batch: int, seen: Seen) -> None:
            for name, observed in observe_inputs(stage, seen, wants, batch, self.windows, label).items():
                parts.setdefault(name, {})[batch] = {name: observed}

        moments = whole_moments(block, hidden, calls, stage, wanted, self.pool, label, noted)
        if wanted:
            require_whole(self.experts, moments, prefix + stage.names[0])
        observed: dict[str, LayerStatistics] = {}
        for batches in parts.values():
            observed |= merge_observed(batches[batch] for batch in sorted(batches))
        found: dict[str, LayerStatistics] = {}
        shared: dict[int, LayerStatistics] = {}  # experts that read the layer's input have one object
        for key, known in moments.items():
            if _place(key) in observed:
                shared[id(known)] = replace(observed[_place(key)], hessian=known.hessian)
            found[whole_key(prefix + _place(key))] = shared[id(known)]
        return found

    def _outside(self, weight: Weight, hidden: Sequence[Tensor]) -> None:
        stage = Stage((weight.memory,), shared=True)

        def seen(batch: int) -> Seen:
            return inputs_outside(self.stream, weight.memory, self.ids[batch], hidden[batch])

        # one at a time: the blocks step aside while the model's own forward runs
        with Pool(1) as alone:
            self.writer.add(self._stage(stage, seen, alone, ""))
        self.progress.advance(weight.elements, weight.memory)


def _place(key: Key) -> str:
    return layer_key(key.name, key.expert)
