"""The recipe's transforms, applied to one block at a time, and what they changed, under its names on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import ModelError, NumericsError
from bitgrain.models.naming import revert_tensors
from bitgrain.models.pairs import find_pairs
from bitgrain.models.residual import find_outside, find_stream
from bitgrain.models.stream import Call, StreamedModel, call_block
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.clusters import Clusters
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.runs import observe
from bitgrain.pipeline.blockwise.sizes import Measured, Part, Sizes, sizes_of_stage
from bitgrain.pipeline.blockwise.stages import find_stages
from bitgrain.pipeline.plan import Plan
from bitgrain.recipes.steps import read_step
from bitgrain.runtime.channel_order import attach_orders, stop_reordering
from bitgrain.runtime.online import attach_rotations, stop_rotating
from bitgrain.transforms.base import BlockView, OutsideView, Transform

PROBE = (4, 32)
"""Windows, and tokens of each, on which pairs are discovered and proved."""
RESIDUAL_WINDOWS = 8
"""Calibration windows on which rotations are learned."""
_RESIDUALS = 1 << 27  # elements of what enters the blocks that are held


class Rewriter:
    """The transforms of a plan. Without any, nothing is touched."""

    def __init__(self, plan: Plan, stream: StreamedModel, pool: Pool) -> None:
        self.plan, self.stream, self.pool = plan, stream, pool
        self.steps = [read_step(choice) for choice in plan.recipe.transforms]
        self.left_out: list[str] = []
        """Why optional transforms are not applied."""
        self._memory: dict[Transform, dict[str, Any]] = {}
        assert plan.calibration is not None
        self.probe = plan.calibration.ids[: PROBE[0], : PROBE[1]]

    def outside(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Rewrite what lies outside the blocks: changed tensors, and one record for each transform that did.

        To be called first, also by a job that goes on. Raises ModelError, NumericsError where a transform that is not
        optional does not hold for this model.
        """
        self._rehearse()
        return self._outside([step.transform for step in self.steps])

    def _rehearse(self) -> None:
        """Leave out the optional transforms that this model refuses, tried on one block of each kind."""
        optional = [step for step in self.steps if step.optional]
        if not optional:
            return
        captured = self.stream.capture(self.probe)
        for step in optional:
            names = self.stream.names(None) if step.transform.whole_model else []
            kept = {name: self.plan.checkpoint.read(name) for name in names}
            try:
                self._outside([step.transform])
                for index in self._kinds(captured.calls):
                    block = self.stream.load_block(index)
                    try:
                        call = captured.calls[index]
                        self._rewrite([step.transform], index, block, [captured.hidden], [call], captured.hidden, call)
                    finally:
                        stop_rotating(block)
                        stop_reordering(block)
                        self.stream.free_block(index)
            except (ModelError, NumericsError) as error:
                reason = str(error).partition("; ")[0]  # the remedy after it is to leave it out
                self.left_out.append(f"{step.name} is left out: {reason}")
                self.steps.remove(step)
            finally:
                self.stream.put(kept)

    def _kinds(self, reached: Collection[int]) -> list[int]:
        """The first block of each kind: its class, and the names and shapes of its parameters."""
        first: dict[Any, int] = {}
        for index in sorted(reached):
            block = self.stream.block(index)
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
            first.setdefault((type(block), shapes), index)
        return list(first.values())

    def _outside(self, transforms: Sequence[Transform]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        wanted = [transform for transform in transforms if transform.whole_model]
        if not wanted:
            return {}, []

        def run() -> Tensor:
            output: Any = self.stream.around(self.probe)
            return output.logits if getattr(output, "logits", None) is not None else output[0]

        names = self.plan.anatomy.block_names
        self._memory.clear()
        before = self._exported(None, self.stream.model)
        told: list[dict[str, Any]] = []
        with single_threaded(), torch.no_grad():
            for transform in wanted:
                view = OutsideView(
                    module=self.stream.model,
                    stream=find_outside(self.stream.model, run, names),
                    run=run,
                    residuals=self._residuals,
                    memory=self._memory.setdefault(transform, {}),
                )
                told.append(transform.apply_outside(view))
        after = self._exported(None, self.stream.model)
        return {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}, told

    def _residuals(self) -> Tensor:
        """What enters the blocks: of the first calibration windows, as many tokens of each block as may be held."""
        assert self.plan.calibration is not None
        ids = self.plan.calibration.ids[:RESIDUAL_WINDOWS]
        captured = self.stream.capture(ids)
        hidden, kept = captured.hidden, list[Tensor]()
        for index in sorted(captured.calls):
            tokens = hidden.flatten(0, -2)
            most = max(1, _RESIDUALS // (tokens.shape[-1] * len(captured.calls)))
            kept.append(tokens[:: -(-len(tokens) // most)].float())
            self.stream.load_block(index)
            hidden = self.stream.run(index, hidden, captured.calls[index])
            self.stream.free_block(index)
        return torch.cat(kept)

    def block(
        self, index: int, block: nn.Module, full: Sequence[Tensor], calls: Sequence[Call], hidden: Tensor, call: Call
    ) -> Rewritten:
        """Rewrite one block in place.

        full, calls   the calibration batches that enter it; hidden, call: the probe
        """
        transforms = [step.transform for step in self.steps]
        return self._rewrite(transforms, index, block, full, calls, hidden, call) if transforms else Rewritten()

    def go_on(self, index: int, told: Sequence[Mapping[str, Any]], order: Callable[[str], Tensor]) -> None:
        """Make a block that was rewritten before the job was stopped run as it did, from what `block` told of it.

        order: parameter of the block -> the order that its columns were given
        """
        for figures in told:
            attach_rotations(self.stream.block(index), figures.get("online", {}))
            norms: Mapping[str, str] = figures.get("norms", {})
            attach_orders(self.stream.block(index), {path: order(reader) for path, reader in norms.items()})

    def _rewrite(
        self,
        transforms: Sequence[Transform],
        index: int,
        block: nn.Module,
        full: Sequence[Tensor],
        calls: Sequence[Call],
        hidden: Tensor,
        call: Call,
    ) -> Rewritten:
        stop_rotating(block)  # of a rehearsal
        stop_reordering(block)
        before = self._exported(index, block)
        for name, tensor in before.items():
            # NaN is for the solver to report, by the layer's name
            if not torch.allclose(tensor, self.plan.checkpoint.read(name).to(tensor), 0.0, 0.0, equal_nan=True):
                raise ModelError(f"{name} cannot be written back as transformers reads it: use no transforms here")
        told: list[dict[str, Any]] = []
        clusters: dict[str, Clusters] = {}

        def probe() -> Tensor:
            return _output(block, hidden, call)

        def run(batch: int) -> Tensor:
            return _output(block, full[batch], calls[batch])

        with single_threaded(), torch.no_grad():
            for transform in transforms:
                pairs = find_pairs(block, probe)
                inputs = Measured(lambda: self._sizes(index, block, full, calls))
                view = BlockView(
                    module=block,
                    path=self.plan.anatomy.block_names[index],
                    pairs=pairs,
                    run=run,
                    samples=len(full),
                    stream=find_stream(block, probe, pairs) if transform.whole_model else None,
                    specs=self._specs(index),
                    absmax=Part(inputs, "absmax"),
                    mean_abs=Part(inputs, "mean"),
                    low=Part(inputs, "low"),
                    high=Part(inputs, "high"),
                    clusters=clusters,
                    memory=self._memory.setdefault(transform, {}),
                )
                told.append(transform.apply(view))
        after = self._exported(index, block)
        changed = {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        return Rewritten(changed, told, clusters)

    def _exported(self, index: int | None, module: nn.Module) -> dict[str, Tensor]:
        """Copies of the float tensors of a block (None: outside the blocks) under their names on disk."""
        prefix = "" if index is None else self.plan.anatomy.block_names[index] + "."
        tensors = {
            prefix + name: parameter.detach() for name, parameter in module.named_parameters() if not parameter.is_meta
        }
        reverted = revert_tensors(self.stream.model, tensors, self.stream.names(index))
        wanted = [
            name for name in self.stream.names(index) if self.plan.checkpoint.entries[name].dtype.is_floating_point
        ]
        missing = [name for name in wanted if name not in reverted and name not in self._buffers()]
        if missing:
            raise ModelError(f"{missing[0]} cannot be written back as transformers reads it: use no transforms here")
        return {name: reverted[name].clone() for name in wanted if name in reverted}

    def _buffers(self) -> set[str]:
        memory = {name for name, _ in self.stream.model.named_buffers()}
        return {name for name, target in self.plan.anatomy.memory_of.items() if target in memory}

    def _specs(self, index: int) -> dict[str, tuple[QuantSpec, QuantSpec | None]]:
        prefix = self.plan.anatomy.block_names[index] + "."
        return {
            # the columns that weights keep are chosen when all transforms are done
            target.removeprefix(prefix): (replace(layer.scheme.weight, columns=None), layer.scheme.input)
            for weight in self.plan.anatomy.weights
            if weight.block == index and (layer := self.plan.quantized.get(weight.tensor)) is not None
            for target in weight.targets
        }

    def _sizes(self, index: int, block: nn.Module, full: Sequence[Tensor], calls: Sequence[Call]) -> dict[str, Sizes]:
        """For each matrix, the sizes of its input channels; stacks have a row for each expert."""
        prefix = self.plan.anatomy.block_names[index] + "."
        weights = [weight for weight in self.plan.anatomy.weights if weight.block == index and weight.role != "conv"]
        names = list(dict.fromkeys(target.removeprefix(prefix) for weight in weights for target in weight.targets))
        stages = [stage for stage in find_stages(block, names, full[0], calls[0]) if stage.reached]
        totals: dict[tuple[str, int | None], Sizes] = {}
        tokens: dict[tuple[str, int | None], int] = {}

        def one(batch: int) -> list[tuple[tuple[str, int | None], Sizes, int]]:
            seen, _ = observe(block, full[batch], calls[batch], stages)
            return [
                ((key.name, key.expert), Sizes(x.amin(0), x.amax(0), x.abs().sum(0)), len(x))
                for key, x in seen.inputs.items()
                if len(x)
            ]

        for found in self.pool.map(one, range(len(full))):
            for key, sizes, count in found:
                totals[key] = totals[key].joined(sizes) if key in totals else sizes
                tokens[key] = tokens.get(key, 0) + count
        means = {key: replace(sizes, mean=sizes.mean / tokens[key]) for key, sizes in totals.items()}
        return {name: sizes for stage in stages for name, sizes in sizes_of_stage(stage, means, block)}


@dataclass(frozen=True)
class Rewritten:
    """What transforms did to a block: changed tensors under their names on disk, a record for each transform, and
    parameter -> the clusters of its input channels."""

    changed: dict[str, Tensor] = field(default_factory=dict)
    told: list[dict[str, Any]] = field(default_factory=list)
    clusters: dict[str, Clusters] = field(default_factory=dict)


def _output(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    output = call_block(block, hidden, call)
    return output[0] if isinstance(output, tuple) else output
