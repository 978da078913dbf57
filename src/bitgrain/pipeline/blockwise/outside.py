"""What lies outside the blocks: embeddings, and the head, whose inputs are the model's last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from bitgrain.models.stream import StreamedModel
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.block import Flow, SolvedBlock
from bitgrain.pipeline.blockwise.columns import choose_columns, columns_of, needs_inputs
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.layer import loss_note, record_of, solve_layer, wants_moments
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage
from bitgrain.pipeline.blockwise.static import Observing, choose_inputs
from bitgrain.pipeline.load import input_quantizer_for, shared_columns
from bitgrain.pipeline.plan import Plan
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.watch import Done, Key, Watch
from bitgrain.solvers import Moments, get_solver


def solve_outside(
    plan: Plan,
    stream: StreamedModel,
    flow: Flow,
    ids: Sequence[Tensor],
    pool: Pool,
    advance: Callable[[int, str], None],
    changed: Mapping[str, Tensor],
) -> SolvedBlock:
    """The quantized layers outside the blocks; `flow` is behind the last block; `changed`: what transforms made."""
    result = SolvedBlock(changed=dict(changed))
    solver, target = get_solver(plan.recipe.solver), plan.recipe.target
    for weight in stream.anatomy.weights:
        layer = plan.quantized.get(weight.tensor)
        if weight.block is not None or layer is None:
            continue
        key = Key(weight.memory)
        original = changed[weight.tensor] if weight.tensor in changed else plan.checkpoint.read(weight.tensor)
        moments: dict[Key, Moments] = {}
        measured = wants_moments(plan, weight)
        kept = [] if needs_inputs(layer) else columns_of(layer, original)
        if weight.role != "embedding" and (measured or layer.static_input is not None or needs_inputs(layer)):
            stage = Stage((weight.memory,), shared=True)
            hidden = flow.quantized or flow.full
            rounding: list[InputQuantizer] = []

            def seen(
                batch: int,
                name: str = weight.memory,
                hidden: list[Tensor] = hidden,
                rounding: list[InputQuantizer] = rounding,
            ) -> Seen:
                found = inputs_outside(stream, name, ids[batch], hidden[batch])
                return Seen({key: rounding[0](x) for key, x in found.inputs.items()}) if rounding else found

            def full(batch: int, name: str = weight.memory) -> Seen:
                return inputs_outside(stream, name, ids[batch], flow.full[batch])

            compare = target is not None and flow.quantized and flow.full
            # one at a time: the blocks step aside while the model's own forward runs
            with Pool(1) as alone:
                layers, windows = {weight.tensor: layer}, [len(one) for one in ids]
                observing: Observing = (
                    *(stage, layers, {weight.tensor: weight.memory}, seen, windows),
                    *(lambda _, original=original: original, alone, "the model"),
                )
                if needs_inputs(layer):
                    kept = choose_columns(*observing)[weight.tensor]
                if layer.static_input is not None:
                    result.inputs.update(choose_inputs(*observing))
                if flow.quantized and (spec := layer.scheme.input) is not None:
                    static = [result.inputs[weight.tensor].static] if layer.static_input is not None else []
                    columns = shared_columns(kept, weight.tensor)
                    rounding.append(input_quantizer_for(spec, static=static, columns=columns))
                if measured:
                    moments = gather_moments(stage, len(ids), seen, full if compare else None, alone, "the model")
        keys = [key] * layer.experts
        chosen = get_solver("rtn") if weight.role == "embedding" else solver
        solutions = next(
            pool.map(
                lambda _, a=(layer, original, moments, keys, chosen), kept=kept: solve_layer(
                    *a, target, None, stream.device, kept
                ),
                [None],
            )
        )
        result.parts[weight.tensor] = [solution.q for solution in solutions]
        told = result.inputs[weight.tensor].record if weight.tensor in result.inputs else {}
        result.records[weight.tensor] = {**record_of(layer, original, solutions), **told}
        advance(layer.elements, loss_note(layer.module, solutions))
    return result


def inputs_outside(stream: StreamedModel, name: str, ids: Tensor, hidden: Tensor) -> Seen:
    """What the parameter `name` outside the blocks is given, `hidden` being the last block's output [batch, ..]."""
    found: list[Tensor] = []

    def product(_: Key, x: Tensor) -> None:
        found.append(x.reshape(-1, x.shape[-1]))
        raise Done

    with suppress(Done), torch.no_grad(), Watch({name: stream.model.get_parameter(name)}, product):
        stream.tail(ids, hidden)
    return Seen({Key(name): found[0]} if found else {})
