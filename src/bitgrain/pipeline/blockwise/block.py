"""One block: transformed, then its stages one after the other, each solved and put in place before the next is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.layer import dense_of, loss_note, record_of, solve_layer, wants_moments
from bitgrain.pipeline.blockwise.local import block_settings, tune_locally
from bitgrain.pipeline.blockwise.rewrite import Rewriter
from bitgrain.pipeline.blockwise.runs import Kept, Reruns, Runs, Walk
from bitgrain.pipeline.blockwise.stages import Stage, find_stages
from bitgrain.pipeline.blockwise.static import Chosen, choose_inputs, require_reached, static_layers
from bitgrain.pipeline.cost import HOLD_BYTES as _HOLD_BYTES
from bitgrain.pipeline.cost import STREAMS as _STREAMS
from bitgrain.pipeline.layers import outer_scales
from bitgrain.pipeline.load import attach_input_quantizers, input_quantizer_for
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
    experts: dict[str, list[int]] = field(default_factory=dict)
    """How many tokens each expert of a module saw."""


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
        self.dense: dict[str, Tensor] = {}
        self.clusters: dict[str, Clusters] = {}
        self.result = SolvedBlock()

    def solve(self) -> SolvedBlock:
        full = self.stream.load_block(self.index)
        calls = [batch.calls[self.index] for batch in self.flow.batches]
        self._transform(full, calls)
        block = twin(full) if self.flow.quantized else full
        schemes = {name: layer.scheme for name, layer in self.layers.items() if layer.static_input is None}
        if self.flow.quantized:
            attach_input_quantizers(block, self.stream.anatomy, schemes, prefix=self.prefix)
        names = list(dict.fromkeys(self._parameter(weight) for weight in self.weights.values()))
        stages = find_stages(full, names, (self.flow.full or self.flow.quantized)[0], calls[0]) if names else []
        require_reached([name for stage in stages if not stage.reached for name in self._static(stage)])
        reached = [stage for stage in stages if stage.reached and (self.owner.needs_moments or self._static(stage))]
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
                self._choose_inputs(stage, place, quantized or exact, block)
                moments = self._moments(stage, place, quantized, exact) if self.owner.needs_moments else {}
                self._count_experts(stage, moments, block)
                self._solve_stage(stage, moments, outer, block)
                for one in (quantized, exact):
                    if one is not None:
                        one.release(place)
            for stage in stages:
                if stage not in reached:
                    self._solve_stage(stage, {}, outer, block)
            full_outputs = self._outputs(exact)
            if self.owner.tuning is not None:
                self._tune(block, calls, full_outputs)
                again = Reruns(block, self.flow.quantized or self.flow.full, calls, [], self.pool)
                quantized = stack.enter_context(again) if self.flow.quantized else None
            self.flow.quantized, self.flow.full = self._outputs(quantized), full_outputs
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

    def _static(self, stage: Stage) -> list[str]:
        names = [name for name, weight in self.weights.items() if self._parameter(weight) in stage.names]
        return static_layers(self.layers, names)

    def _choose_inputs(self, stage: Stage, place: int, walk: Walk | None, block: nn.Module) -> None:
        """Choose the static scales of a stage's inputs; the quantized block rounds by them from here on."""
        assert walk is not None
        parameters = {name: self._parameter(weight) for name, weight in self.weights.items()}
        windows = [len(hidden) for hidden in self.flow.quantized or self.flow.full]
        chosen = choose_inputs(
            *(stage, self.layers, parameters, lambda batch: walk.seen(batch, place), windows),
            *(self._original, self.pool, self.prefix.removesuffix("."), self.clusters),
        )
        self.result.inputs.update(chosen)
        if not chosen or not self.flow.quantized:
            return
        targets = {target for name in chosen for target in self.joined_of[name]}
        together = {weight.tensor for target in targets for weight in self.joined[target]}
        schemes = {name: layer.scheme for name, layer in self.layers.items() if name in together}
        static = {name: [one.static] for name, one in chosen.items()}
        attach_input_quantizers(block, self.stream.anatomy, schemes, prefix=self.prefix, static=static)
        rounding = {
            parameters[name]: input_quantizer_for(spec, static=static[name])
            for name in chosen
            if (spec := self.layers[name].static_input) is not None
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

    def _count_experts(self, stage: Stage, moments: Mapping[Key, Moments], block: nn.Module) -> None:
        for name in stage.names if moments else ():
            parameter = block.get_parameter(name)
            if parameter.ndim > 2:
                seen = [moments.get(Key(name, i)) for i in range(len(parameter))]
                module = self.prefix + name.rpartition(".")[0]
                self.result.experts[module] = [0 if one is None else one.tokens for one in seen]

    def _outputs(self, walk: Walk | None) -> list[Tensor]:
        outputs = [] if walk is None else walk.outputs()
        for output in outputs:
            if not bool(torch.isfinite(output.sum()).item()):
                raise NumericsError(f"{self.prefix.removesuffix('.')}: its output holds NaN or Inf on calibration text")
        return outputs

    def _solve_stage(
        self, stage: Stage, moments: Mapping[Key, Moments], outer: Mapping[str, Tensor], block: nn.Module
    ) -> None:
        names = [name for name, weight in self.weights.items() if self._parameter(weight) in stage.names]

        def one(name: str) -> tuple[list[Solution], dict[str, Any]]:
            weight, layer, original = self.weights[name], self.layers[name], self._original(name)
            experts = range(layer.experts) if layer.experts > 1 else [weight.expert]
            keys = [Key(self._parameter(weight), expert) for expert in experts]
            solver, target = self.owner.solver, self.owner.recipe.target
            solutions = solve_layer(layer, original, moments, keys, solver, target, outer.get(name), self.stream.device)
            return solutions, record_of(layer, original, solutions)

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
