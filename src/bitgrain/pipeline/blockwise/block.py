"""One block: transformed, then its stages one after the other, each solved and put in place before the next is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import NumericsError
from bitgrain.models.anatomy import Weight
from bitgrain.models.naming import convert_tensors
from bitgrain.models.stream import Call, Captured, StreamedModel, call_block, twin
from bitgrain.numerics import QTensor
from bitgrain.numerics.clusters import Clusters
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.cache import observe_cache
from bitgrain.pipeline.blockwise.columns import choose_columns, columns_of, keeping_layers
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.layer import dense_of, loss_note, record_of, solve_layer, wants_moments
from bitgrain.pipeline.blockwise.local import block_settings, tune_locally
from bitgrain.pipeline.blockwise.rewrite import Rewriter
from bitgrain.pipeline.blockwise.runs import Kept, Reruns, Runs, Walk
from bitgrain.pipeline.blockwise.spread import whole_moments
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.pipeline.blockwise.static import Chosen, Observing, choose_inputs, require_reached, static_layers
from bitgrain.pipeline.cost import HOLD_BYTES as _HOLD_BYTES
from bitgrain.pipeline.cost import STREAMS as _STREAMS
from bitgrain.pipeline.experts import (
    experts_of,
    needs_whole,
    note_for,
    require_whole,
    settle,
    told_of,
    told_of_model,
)
from bitgrain.pipeline.layers import outer_scales
from bitgrain.pipeline.load import attach_input_quantizers, input_quantizer_for, shared_columns
from bitgrain.pipeline.plan import Plan
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments, Solution, get_solver

_ERRORS = ("sqnr_db", "cosine", "mse", "max_error", "warnings")
"""Figures of a record that compare weights: they are taken anew after tuning."""


@dataclass
class Flow:
    """The calibration batches on their way through the model: hidden states entering the next block.

    quantized  as the blocks quantized so far leave them; full: as those of the full-precision model do
    probe      a few tokens in full precision, on which transforms are proved; None: there are no transforms
    """

    batches: list[Captured]
    quantized: list[Tensor]
    full: list[Tensor]
    probe: Captured | None = None


@dataclass
class SolvedBlock:
    """What became of a block: QTensors and static inputs by original tensor name, tensors that a transform changed,
    records."""

    parts: dict[str, list[QTensor]] = field(default_factory=dict)
    inputs: dict[str, Chosen] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    transforms: list[dict[str, Any]] = field(default_factory=list)
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is told of the experts of a module: see `experts.told_of_model`."""
    cache: dict[str, Tensor] = field(default_factory=dict)
    """Static scales of keys and values, by name on disk."""


class BlockSolver:
    """Solves the blocks of a plan in their order; `advance(elements, note)` is told of every layer."""

    def __init__(
        self, plan: Plan, stream: StreamedModel, pool: Pool, advance: Callable[[int, str], None] | None = None
    ) -> None:
        self.plan, self.stream, self.pool = plan, stream, pool
        self.rewriter = Rewriter(plan, stream, pool)
        self.recipe = plan.recipe
        self.solver = get_solver(self.recipe.solver)
        self.sequential = self.recipe.calibration.activations == "quantized"
        self.advance = advance or (lambda _elements, _note: None)
        blockwise = self.recipe.tuning.blockwise
        self.tuning = None if blockwise is None else block_settings(blockwise)
        self.needs_moments = wants_moments(plan)

    def solve(self, index: int, flow: Flow) -> SolvedBlock:
        """Solve block `index` and move `flow` behind it."""
        return _Block(self, index, flow).solve()


class _Block:
    def __init__(self, owner: BlockSolver, index: int, flow: Flow) -> None:
        self.owner, self.index, self.flow = owner, index, flow
        self.plan, self.stream, self.pool = owner.plan, owner.stream, owner.pool
        self.prefix = self.stream.anatomy.block_names[index] + "."
        here = [weight for weight in self.stream.anatomy.weights if weight.block == index]
        self.weights = {weight.tensor: weight for weight in here if weight.tensor in self.plan.quantized}
        self.layers = {name: self.plan.quantized[name] for name in self.weights}
        self.joined: dict[str, list[Weight]] = {}  # parameter -> all tensors that fill it
        for weight in here:
            for target in weight.targets:
                self.joined.setdefault(target, []).append(weight)
        self.joined_of = {weight.tensor: weight.targets for weight in here}
        self.experts = experts_of(self.weights.values(), self.prefix)
        self.tokens: dict[Key, int] = {}  # that the experts' matrices saw
        self.dense: dict[str, Tensor] = {}
        self.columns: dict[str, list[Tensor]] = {}
        self.clusters: dict[str, Clusters] = {}
        self.result = SolvedBlock()

    def solve(self) -> SolvedBlock:
        full = self.stream.load_block(self.index)
        calls = [batch.calls[self.index] for batch in self.flow.batches]
        self._transform(full, calls)
        block = twin(full) if self.flow.quantized else full
        later = {*static_layers(self.layers, self.layers), *keeping_layers(self.layers)}
        schemes = {name: layer.scheme for name, layer in self.layers.items() if name not in later}
        if self.flow.quantized:
            attach_input_quantizers(block, self.stream.anatomy, schemes, prefix=self.prefix)
        names = list(dict.fromkeys(self._parameter(weight) for weight in self.weights.values()))
        stages = find_stages(full, names, (self.flow.full or self.flow.quantized)[0], calls[0]) if names else []
        require_reached([name for stage in stages if not stage.reached for name in self._static(stage)])
        wanted = [stage for stage in stages if self.owner.needs_moments or later.intersection(self._of(stage))]
        reached = [stage for stage in wanted if stage.reached]
        outer = outer_scales(self.layers, self.plan.fused_groups, self._original, self.stream.device)
        with ExitStack() as stack:
            quantized = exact = None
            lean = self._too_much(reached)
            if self.flow.quantized:
                again = Reruns(block, self.flow.quantized, calls, reached, self.pool)
                quantized = stack.enter_context(
                    again if lean else Runs(block, self.flow.quantized, calls, reached, self.pool.workers)
                )
            if self.flow.full:
                again = Reruns(full, self.flow.full, calls, reached, self.pool)
                exact = stack.enter_context(again if lean else Kept(full, self.flow.full, calls, reached))
            for place, stage in enumerate(reached):
                self._choose_columns(stage, place, quantized or exact, block)
                self._choose_inputs(stage, place, quantized or exact, block)
                moments = self._moments(stage, place, quantized, exact) if self.owner.needs_moments else {}
                moments, notes = self._settle(stage, moments, block if quantized is not None else full, calls)
                self._solve_stage(stage, moments, notes, outer, block)
                for one in (quantized, exact):
                    if one is not None:
                        one.release(place)
            for stage in stages:
                if stage not in reached:
                    self._solve_stage(stage, {}, {}, outer, block)
            if self.tokens:
                told = told_of_model(self.owner.recipe.experts, self.experts, self.tokens)
                self.result.experts = {self.prefix + path: one for path, one in told.items()}
            full_outputs = self._outputs(exact)
            if self.owner.tuning is not None:
                self._tune(block, calls, full_outputs)
                again = Reruns(block, self.flow.quantized or self.flow.full, calls, [], self.pool)
                quantized = stack.enter_context(again) if self.flow.quantized else None
            quantized_outputs = self._outputs(quantized)
            if self.plan.cache is not None:
                entering = self.flow.quantized or self.flow.full
                self.result.cache = observe_cache(self.plan.cache, self.index, block, entering, calls, self.pool)
            self.flow.quantized, self.flow.full = quantized_outputs, full_outputs
        self.stream.free_block(self.index)
        return self.result

    def _transform(self, full: nn.Module, calls: Sequence[Call]) -> None:
        probe = self.flow.probe
        if probe is None:
            return
        call = probe.calls[self.index]
        found = self.owner.rewriter.block(self.index, full, self.flow.full, calls, probe.hidden, call)
        self.result.changed, self.result.transforms, self.clusters = found.changed, found.told, found.clusters
        for name, tensor in self.result.changed.items():  # what is kept is written in the checkpoint's own dtype
            if name not in self.layers:
                self.result.changed[name] = tensor.to(self.plan.checkpoint.entries[name].dtype)
        self.stream.put({**self.result.changed, **self._beside(self.result.changed)})
        with torch.no_grad(), single_threaded():
            output = call_block(full, probe.hidden, call)
        probe.hidden = output[0] if isinstance(output, tuple) else output

    def _beside(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are joined in memory with changed ones."""
        targets = {target for name, of in self.joined_of.items() if name in changed for target in of}
        return {
            weight.tensor: self.plan.checkpoint.read(weight.tensor)
            for target in targets
            for weight in self.joined[target]
            if weight.tensor not in changed
        }

    def _tune(self, block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor]) -> None:
        """All layers of the block together, by its output. Records keep what the solver reached."""
        assert self.owner.tuning is not None
        if not self.result.parts:
            return
        originals = {name: self._original(name) for name in self.layers}
        targets_of = {target for weight in self.weights.values() for target in weight.targets}
        beside = {
            weight.tensor: self._original(weight.tensor)
            for target in targets_of
            for weight in self.joined[target]
            if weight.tensor not in self.layers
        }
        inputs = self.flow.quantized or self.flow.full
        parts, record = tune_locally(
            self.stream.model,
            block,
            self.prefix,
            self.layers,
            originals,
            beside,
            self.result.parts,
            inputs,
            calls,
            targets,
            self.owner.tuning,
        )
        self.result.parts = parts
        for name, layer in self.layers.items():
            solved = [Solution(part, "tuned") for part in parts[name]]
            self.dense[name] = dense_of(layer, solved)
            tuned = record_of(layer, originals[name], solved)
            before = self.result.records[name]
            self.result.records[name] = {**before, **{key: tuned[key] for key in tuned if key in _ERRORS}}
            self.result.records[name]["tuning"] = record
        self._put(block, list(self.layers))

    def _too_much(self, stages: Sequence[Stage]) -> bool:
        """Whether the activations of all batches inside the block are more than should be held."""
        inputs = self.flow.full or self.flow.quantized
        tokens = sum(one.numel() // one.shape[-1] for one in inputs)
        widest = max((layer.in_features for layer in self.layers.values()), default=0)
        held = 4 * tokens * (widest + _STREAMS * inputs[0].shape[-1])
        both = 2 if self.flow.full and self.flow.quantized else 1
        return not stages or not all(stage.shared for stage in stages) or both * held > _HOLD_BYTES

    def _of(self, stage: Stage) -> list[str]:
        """The tensors that a stage solves."""
        return [name for name, weight in self.weights.items() if self._parameter(weight) in stage.names]

    def _static(self, stage: Stage) -> list[str]:
        return static_layers(self.layers, self._of(stage))

    def _choose_columns(self, stage: Stage, place: int, walk: Walk | None, block: nn.Module) -> None:
        """Choose the columns that a stage's weights keep; their inputs are not rounded from here on."""
        assert walk is not None
        chosen = choose_columns(*self._observing(stage, place, walk))
        self.columns.update(chosen)
        self._attach([name for name in chosen if self.layers[name].scheme.input is not None], walk, block)

    def _choose_inputs(self, stage: Stage, place: int, walk: Walk | None, block: nn.Module) -> None:
        """Choose the static scales of a stage's inputs; the quantized block rounds by them from here on."""
        assert walk is not None
        chosen = choose_inputs(*self._observing(stage, place, walk), self.clusters)
        self.result.inputs.update(chosen)
        self._attach(list(chosen), walk, block)

    def _observing(self, stage: Stage, place: int, walk: Walk) -> Observing:
        """What `choose_inputs` and `choose_columns` look at."""
        parameters = {name: self._parameter(weight) for name, weight in self.weights.items()}
        windows = [len(hidden) for hidden in self.flow.quantized or self.flow.full]
        label = self.prefix.removesuffix(".")
        seen = partial(walk.seen, stage=place)
        return stage, self.layers, parameters, seen, windows, self._original, self.pool, label

    def _attach(self, names: Sequence[str], walk: Walk, block: nn.Module) -> None:
        """The quantized block, and the runs that stand in front of them, round the inputs of these layers from here
        on."""
        if not names or not self.flow.quantized:
            return
        targets = {target for name in names for target in self.joined_of[name]}
        together = {weight.tensor for target in targets for weight in self.joined[target]}
        schemes = {name: layer.scheme for name, layer in self.layers.items() if name in together}
        static = {name: [self.result.inputs[name].static] for name in names if name in self.result.inputs}
        attach_input_quantizers(
            block, self.stream.anatomy, schemes, prefix=self.prefix, static=static, columns=self.columns
        )
        rounding = {
            self._parameter(self.weights[name]): input_quantizer_for(
                spec, static=static.get(name, ()), columns=shared_columns(self.columns.get(name, ()), name)
            )
            for name in names
            if (spec := self.layers[name].scheme.input) is not None
        }
        walk.round_inputs(rounding)

    def _moments(self, stage: Stage, place: int, quantized: Walk | None, exact: Walk | None) -> dict[Key, Moments]:
        count, label = len(self.flow.batches), self.prefix.removesuffix(".")
        if quantized is None:
            assert exact is not None
            now, then = exact, None
        else:
            now, then = quantized, exact
        return gather_moments(
            stage,
            count,
            lambda batch: now.seen(batch, place),
            None if then is None or self.owner.recipe.target is None else lambda batch: then.seen(batch, place),
            self.pool,
            label,
        )

    def _settle(
        self, stage: Stage, moments: dict[Key, Moments], running: nn.Module, calls: Sequence[Call]
    ) -> tuple[dict[Key, Moments], dict[Key, str]]:
        """The same moments with those of experts as the recipe's policy wants them; and what is to be told of each."""
        every = {key: n for layer in self.experts.values() for one in layer for key, n in one.items()}
        keys = {key: n for key, n in every.items() if key.name in stage.names}
        if not moments or not keys:
            return moments, {}
        experts, inputs = self.owner.recipe.experts, self.flow.quantized or self.flow.full
        tokens = {key: moments[key].tokens if key in moments else 0 for key in keys}
        self.tokens.update(tokens)
        wanted = [key for key, in_features in keys.items() if needs_whole(experts, tokens[key], in_features)]
        whole = whole_moments(running, inputs, calls, stage, wanted, self.pool, self.prefix.removesuffix("."))
        require_whole(experts, whole, self.prefix + stage.names[0])
        settled, notes = dict(moments), dict[Key, str]()
        for key, in_features in keys.items():
            known = settle(experts, settled.pop(key, None), whole.get(key), in_features)
            if known is not None:
                settled[key] = known
            if note := note_for(experts, tokens[key], key in whole, in_features):
                notes[key] = note
        return settled, notes

    def _outputs(self, walk: Walk | None) -> list[Tensor]:
        outputs = [] if walk is None else walk.outputs()
        for output in outputs:
            if not bool(torch.isfinite(output.sum()).item()):
                raise NumericsError(f"{self.prefix.removesuffix('.')}: its output holds NaN or Inf on calibration text")
        return outputs

    def _solve_stage(
        self,
        stage: Stage,
        moments: Mapping[Key, Moments],
        notes: Mapping[Key, str],
        outer: Mapping[str, Tensor],
        block: nn.Module,
    ) -> None:
        names = self._of(stage)

        def one(name: str) -> tuple[list[Solution], dict[str, Any]]:
            weight, layer, original = self.weights[name], self.layers[name], self._original(name)
            experts = range(layer.experts) if layer.experts > 1 else [weight.expert]
            keys = [Key(self._parameter(weight), expert) for expert in experts]
            solver, target = self.owner.solver, self.owner.recipe.target
            kept = self.columns[name] if name in self.columns else columns_of(layer, original)
            chosen = (solver, target, outer.get(name), self.stream.device, kept, notes)
            solutions = solve_layer(layer, original, moments, keys, *chosen)
            record = record_of(layer, original, solutions)
            if self.tokens and layer.role == "expert":
                experts, tokens = self.owner.recipe.experts, [self.tokens.get(key, 0) for key in keys]
                record["experts"] = told_of(experts, tokens, experts.threshold(layer.in_features))
            return solutions, record

        for name, (solutions, record) in zip(names, self.pool.map(one, names), strict=True):
            layer = self.layers[name]
            self.result.parts[name] = [solution.q for solution in solutions]
            told = self.result.inputs[name].record if name in self.result.inputs else {}
            self.result.records[name] = {**record, **told}
            self.dense[name] = dense_of(layer, solutions)
            self.owner.advance(layer.elements, loss_note(layer.module, solutions))
        if self.flow.quantized:  # else the block is the full-precision one, which stays as it is
            self._put(block, names)

    def _original(self, name: str) -> Tensor:
        """A weight before it is quantized, as transforms left it."""
        return self.result.changed[name] if name in self.result.changed else self.plan.checkpoint.read(name)

    def _put(self, block: nn.Module, names: Sequence[str]) -> None:
        """Write what was solved into the block; parameters that several tensors fill are put together anew."""
        targets = {target for name in names for target in self.weights[name].targets}
        together = {weight.tensor for target in targets for weight in self.joined[target]}
        device = self.stream.device
        tensors = {name: self.dense[name] if name in self.dense else self._original(name) for name in together}
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}  # they are joined
        for name, tensor in convert_tensors(self.stream.model, tensors).items():
            parameter = block.get_parameter(name.removeprefix(self.prefix))
            parameter.data.copy_(tensor)

    def _parameter(self, weight: Weight) -> str:
        """The parameter of the block whose inputs tell of this weight."""
        return weight.targets[0].removeprefix(self.prefix)
