"""What each way of storing each layer would cost: one pass forward, one backward, block by block.

Labels are drawn from the model's own predictions, and their negative log-likelihood flows back. With g the gradient by
a layer's output, A = E[|g|^2 x x^T] tells what an error in its weights costs in KL divergence (the Fisher information);
with H = E[x x^T] every candidate is rounded by plain GPTQ, as it will be later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import ModelError, NumericsError
from bitgrain.models.anatomy import Weight
from bitgrain.models.stream import Captured, StreamedModel, call_block, share_calls
from bitgrain.numerics import QuantSpec
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.layers import matrices
from bitgrain.runtime.watch import Key, Watch, parameters_of
from bitgrain.search.sensitivity import FisherMoments, quantization_cost, sample_labels
from bitgrain.solvers import Moments
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.rtn import RoundToNearest


@dataclass
class _Sums:
    """Of one matrix: the moments of its inputs, plain and weighted with the gradient."""

    hessian: Tensor
    fisher: FisherMoments

    def add(self, other: _Sums) -> None:
        self.hessian += other.hessian
        self.fisher.sensitivity += other.fisher.sensitivity
        self.fisher.outputs += other.fisher.outputs
        self.fisher.tokens += other.fisher.tokens


def measure_costs(
    stream: StreamedModel,
    ids: Sequence[Tensor],
    layers: Mapping[str, StoredLayer],
    candidates: Callable[[StoredLayer], Sequence[QuantSpec]],
    pool: Pool,
    advance: Callable[[int, str], None],
    seed: int = 0,
) -> dict[str, list[float]]:
    """The predicted KL divergence (nats per token) of each candidate of each layer, by original tensor name.

    ids     calibration windows, batch by batch; layers: what may be quantized, inside the blocks
    advance told of (weights, note) as layers are measured
    A matrix that no token reached costs nothing. Raises ModelError for a model that predicts no tokens.
    """
    batches = [stream.capture(one) for one in ids]
    share_calls(batches)
    reached = sorted(batches[0].calls)
    entering: list[list[Tensor]] = []
    hidden = [batch.hidden for batch in batches]
    for index in reached:
        block = stream.load_block(index)
        entering.append(hidden)

        def forward(i: int, block: nn.Module = block, index: int = index, hidden: list[Tensor] = hidden) -> Tensor:
            output = call_block(block, hidden[i], batches[i].calls[index])
            return output[0] if isinstance(output, tuple) else output

        hidden = list(pool.map(forward, range(len(batches))))
        stream.free_block(index)
    generator = torch.Generator().manual_seed(seed)
    flowing = [_head_gradient(stream, one, last, generator) for one, last in zip(ids, hidden, strict=True)]
    costs: dict[str, list[float]] = {}
    for index, inputs in zip(reversed(reached), reversed(entering), strict=True):
        block = stream.load_block(index)
        prefix = stream.anatomy.block_names[index] + "."
        here = [w for w in stream.anatomy.weights if w.block == index and w.tensor in layers]
        names = list(dict.fromkeys(weight.targets[0].removeprefix(prefix) for weight in here))
        sums, flowing = _backward(block, index, names, inputs, flowing, batches, pool)

        def one(
            weight: Weight, prefix: str = prefix, sums: Mapping[Key, _Sums] = sums, block: nn.Module = block
        ) -> list[float]:
            layer = layers[weight.tensor]
            parameter = weight.targets[0].removeprefix(prefix)
            experts = range(layer.experts) if layer.experts > 1 else [weight.expert]
            found = [sums.get(Key(parameter, expert)) for expert in experts]
            original = stream.read(weight.tensor)
            rows = _rows_in(block.get_parameter(parameter), weight, original)
            return _costs(layer, original, found, candidates(layer), rows, stream.device)

        for weight, found in zip(here, pool.map(one, here), strict=True):
            costs[weight.tensor] = found
            advance(layers[weight.tensor].elements, weight.module)
        stream.free_block(index)
    return costs


def _head_gradient(stream: StreamedModel, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, by the last hidden states, of the sum of -log p(label) with labels that the model itself draws."""
    leaf = hidden.detach().requires_grad_(True)
    with single_threaded():
        output: Any = stream.tail(ids, leaf, grad=True)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ModelError(f"{stream.anatomy.architecture} predicts no tokens, so --bits cannot weigh its layers")
        labels = sample_labels(logits.detach(), generator)
        loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _backward(
    block: nn.Module,
    index: int,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    flowing: Sequence[Tensor],
    batches: Sequence[Captured],
    pool: Pool,
) -> tuple[dict[Key, _Sums], list[Tensor]]:
    """Sums for each matrix of a block, and the gradients by its inputs."""
    parameters = parameters_of(block, names)

    def one(i: int) -> tuple[dict[Key, _Sums], Tensor]:
        seen: dict[Key, list[Tensor]] = defaultdict(list)
        gradients: dict[Key, list[Tensor | None]] = defaultdict(list)

        def product(key: Key, x: Tensor) -> None:
            seen[key].append(x.detach().reshape(-1, x.shape[-1]))

        def output(key: Key, y: Tensor) -> None:
            place = len(gradients[key])
            gradients[key].append(None)

            def keep(g: Tensor) -> None:
                gradients[key][place] = g.detach().reshape(-1, g.shape[-1])

            y.register_hook(keep)

        leaf = inputs[i].detach().requires_grad_(True)
        with Watch(parameters, product, output=output):
            result = call_block(block, leaf, batches[i].calls[index])
        result = result[0] if isinstance(result, tuple) else result
        (flows,) = torch.autograd.grad(result, leaf, flowing[i])
        found: dict[Key, _Sums] = {}
        for key, parts in seen.items():
            known = [(x, g) for x, g in zip(parts, gradients[key], strict=True) if g is not None and len(x)]
            if known:
                x, g = torch.cat([x for x, _ in known]), torch.cat([g for _, g in known])
                sums = _Sums(x.T @ x, FisherMoments.zeros(g.shape[1], x.shape[1], x.device))
                sums.fisher.add(x, g)
                found[key] = sums
        return found, flows

    totals: dict[Key, _Sums] = {}
    passed: list[Tensor] = []
    for found, flows in pool.map(one, range(len(batches)), grad=True):
        passed.append(flows)
        for key, sums in found.items():
            if key in totals:
                totals[key].add(sums)
            else:
                totals[key] = sums
    return totals, passed


def _rows_in(parameter: Tensor, weight: Weight, original: Tensor) -> slice | None:
    """Which rows of the parameter's outputs are those of a tensor that is joined with others in memory (w1 and w3 of
    an expert); all where it is alone, None where they are not in one piece."""
    if weight.expert is None:
        return slice(None) if parameter.numel() == original.numel() else None
    stacked = parameter[weight.expert]
    stacked = stacked if stacked.shape[-1] == original.shape[-1] else stacked.mT
    height = len(original)
    for start in range(0, len(stacked) - height + 1, height):
        if stacked[start : start + height].equal(original.to(stacked)):
            return slice(start, start + height)
    return None


def _costs(
    layer: StoredLayer,
    original: Tensor,
    sums: Sequence[_Sums | None],
    specs: Sequence[QuantSpec],
    rows: slice | None,
    device: torch.device,
) -> list[float]:
    totals = [0.0] * len(specs)
    every = sum(one.fisher.tokens for one in sums if one is not None)
    for matrix, known in zip(matrices(original, layer), sums, strict=True):
        if known is None:
            continue
        weight = matrix.to(device, torch.float32)
        moments = Moments(known.hessian / known.fisher.tokens, known.fisher.tokens)
        share = known.fisher.tokens / every  # an expert counts as often as it is used
        shares = None if rows is None else known.fisher.output_shares()[rows]
        for place, spec in enumerate(specs):
            try:
                q = GPTQ().solve(weight, spec, moments, name=layer.tensor).q
            except NumericsError:
                q = RoundToNearest().round(weight, spec, moments.importance, name=layer.tensor)
            totals[place] += share * quantization_cost(
                weight, q.dequantize(), known.fisher.mean(), shares, layer.tensor
            )
    return totals
