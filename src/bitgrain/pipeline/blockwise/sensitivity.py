"""What each way of storing each layer would cost: one pass forward, one backward, block by block.

Labels are drawn from the model's own predictions, and their negative log-likelihood flows back. With g the gradient by
a layer's output, A = E[|g|^2 x x^T] tells what an error in its weights costs in KL divergence (the Fisher information);
with H = E[x x^T] every candidate is rounded by plain GPTQ, as it will be later. What rounding a layer's inputs costs
is read off directly: 1/2 E[(g_x . dx)^2], g_x being the gradient that the layer sends back to them and dx their error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import ModelError, NumericsError
from bitgrain.kernels.gram import gram, mirror
from bitgrain.models.anatomy import Weight
from bitgrain.models.stream import Captured, StreamedModel, call_block, share_calls
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.ranges import MinMax
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.embeddings import embedding_costs
from bitgrain.pipeline.blockwise.gradients import Recorder
from bitgrain.pipeline.layers import matrices
from bitgrain.pipeline.load import input_quantizer_for
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.watch import Key, parameters_of
from bitgrain.search.sensitivity import FisherMoments, quantization_cost, sample_labels
from bitgrain.solvers import Moments
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.rtn import RoundToNearest

Candidates = Callable[[StoredLayer], Sequence[QuantSpec]]


@dataclass
class Costs:
    """Predicted KL divergence, nats per token, by original tensor name.

    weights  of each candidate, in their order; inputs: of rounding the layer's inputs as its scheme says
    """

    weights: dict[str, list[float]] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)


@dataclass
class _Sums:
    """Of one matrix: the moments of its inputs, plain and weighted with the gradient, and sum (g_x . dx)^2."""

    hessian: Tensor  # the upper triangle, see `kernels.gram`
    fisher: FisherMoments
    inputs: float = 0.0

    @staticmethod
    def of(x: Tensor, g: Tensor, back: Tensor | None, quantizer: InputQuantizer | None) -> _Sums:
        sums = _Sums(gram(x), FisherMoments.zeros(g.shape[1], x.shape[1], x.device))
        sums.fisher.add(x, g)
        if back is not None and quantizer is not None:
            sums.inputs = float((back * (quantizer(x) - x)).sum(-1).square().sum())
        return sums

    def add(self, other: _Sums) -> None:
        self.hessian += other.hessian
        self.fisher.sensitivity += other.fisher.sensitivity
        self.fisher.outputs += other.fisher.outputs
        self.fisher.tokens += other.fisher.tokens
        self.inputs += other.inputs


def measure_costs(
    stream: StreamedModel,
    ids: Sequence[Tensor],
    layers: Mapping[str, StoredLayer],
    candidates: Candidates,
    pool: Pool,
    advance: Callable[[int, str], None],
    seed: int = 0,
) -> Costs:
    """What each candidate of each of `layers` would cost, and the inputs of those whose scheme quantizes them.

    ids     calibration windows, batch by batch; layers: by original tensor name, embeddings and the head among them
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
    measure = _Measure(stream, layers, candidates, sum(one.numel() for one in ids), pool, advance)
    flowing = measure.head(ids, hidden, torch.Generator().manual_seed(seed))
    for index, inputs in zip(reversed(reached), reversed(entering), strict=True):
        flowing = measure.block(index, inputs, flowing, batches)
    embeddings = [weight for weight in measure.of(None) if weight.role == "embedding"]
    for name, found in embedding_costs(stream, ids, flowing, embeddings, layers, candidates).items():
        as_head = measure.costs.weights.get(name)
        if found:
            measure.costs.weights[name] = found if as_head is None else [a + b for a, b in zip(as_head, found)]
        advance(layers[name].elements, layers[name].module)
    return measure.costs


class _Measure:
    """The way back through the model."""

    def __init__(
        self,
        stream: StreamedModel,
        layers: Mapping[str, StoredLayer],
        candidates: Candidates,
        tokens: int,
        pool: Pool,
        advance: Callable[[int, str], None],
    ) -> None:
        self.stream, self.layers, self.candidates, self.tokens = stream, layers, candidates, tokens
        self.pool, self.advance = pool, advance
        self.costs = Costs()

    def of(self, index: int | None) -> list[Weight]:
        """The wanted weights of a block; None: outside the blocks."""
        return [one for one in self.stream.anatomy.weights if one.block == index and one.tensor in self.layers]

    def head(self, ids: Sequence[Tensor], hidden: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """The gradients, by the last hidden states, of the sum of -log p(label), with labels drawn by the model."""
        here = self.of(None)
        parameters, quantizers = self._watched(here, self.stream.model, "")
        totals: dict[Key, _Sums] = {}
        flowing: list[Tensor] = []
        for one, last in zip(ids, hidden, strict=True):
            leaf = last.detach().requires_grad_(True)
            recorder = Recorder(parameters, quantizers)
            with single_threaded():
                with recorder.watch:
                    output: Any = self.stream.tail(one, leaf, grad=True)
                logits = getattr(output, "logits", None)
                if logits is None:
                    architecture = self.stream.anatomy.architecture
                    raise ModelError(f"{architecture} predicts no tokens, so its layers cannot be weighed")
                labels = sample_labels(logits.detach(), generator)
                loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, leaf)
                _collect(totals, _sums(recorder, quantizers))
            flowing.append(gradient)
        self._tell([weight for weight in here if Key(weight.memory) in totals], totals, self.stream.model, "")
        return flowing

    def block(
        self, index: int, inputs: Sequence[Tensor], flowing: Sequence[Tensor], batches: Sequence[Captured]
    ) -> list[Tensor]:
        """The gradients by a block's inputs; its layers are measured on the way."""
        block = self.stream.load_block(index)
        prefix = self.stream.anatomy.block_names[index] + "."
        here = self.of(index)
        parameters, quantizers = self._watched(here, block, prefix)

        def one(i: int) -> tuple[dict[Key, _Sums], Tensor]:
            leaf = inputs[i].detach().requires_grad_(True)
            recorder = Recorder(parameters, quantizers)
            with recorder.watch:
                result = call_block(block, leaf, batches[i].calls[index])
            result = result[0] if isinstance(result, tuple) else result
            (flows,) = torch.autograd.grad(result, leaf, flowing[i])
            return _sums(recorder, quantizers), flows

        totals: dict[Key, _Sums] = {}
        passed: list[Tensor] = []
        for found, flows in self.pool.map(one, range(len(batches)), grad=True):
            passed.append(flows)
            _collect(totals, found)
        self._tell(here, totals, block, prefix)
        self.stream.free_block(index)
        return passed

    def _watched(
        self, weights: Sequence[Weight], module: nn.Module, prefix: str
    ) -> tuple[dict[str, Tensor], dict[str, InputQuantizer]]:
        """The parameters of `weights`, and the quantizers of their inputs, by their names in `module`."""
        names = list(dict.fromkeys(weight.targets[0].removeprefix(prefix) for weight in weights))
        quantizers: dict[str, InputQuantizer] = {}
        for weight in weights:
            spec = self.layers[weight.tensor].scheme.input
            if spec is not None:
                quantizers[weight.targets[0].removeprefix(prefix)] = input_quantizer_for(_dynamic(spec))
        return parameters_of(module, names), quantizers

    def _tell(self, weights: Sequence[Weight], totals: Mapping[Key, _Sums], module: nn.Module, prefix: str) -> None:
        def one(weight: Weight) -> tuple[list[float], float]:
            layer = self.layers[weight.tensor]
            name = weight.targets[0].removeprefix(prefix)
            experts = range(layer.experts) if layer.experts > 1 else [weight.expert]
            found = [totals.get(Key(name, expert)) for expert in experts]
            original = self.stream.read(weight.tensor)
            rows = _rows_in(module.get_parameter(name), weight, original)
            inputs = sum(0.5 * sums.inputs / self.tokens for sums in found if sums is not None)
            return self._costs(layer, original, found, rows), inputs

        for weight, (found, inputs) in zip(weights, self.pool.map(one, weights), strict=True):
            layer = self.layers[weight.tensor]
            self.costs.weights[weight.tensor] = found
            if layer.scheme.input is not None:
                self.costs.inputs[weight.tensor] = inputs
            if weight.role != "embedding":  # which is not done yet
                self.advance(layer.elements, weight.module)

    def _costs(
        self, layer: StoredLayer, original: Tensor, sums: Sequence[_Sums | None], rows: slice | None
    ) -> list[float]:
        specs = self.candidates(layer)
        totals = [0.0] * len(specs)
        for matrix, known in zip(matrices(original, layer), sums, strict=True):
            if known is None:
                continue
            weight = matrix.to(self.stream.device, torch.float32)
            moments = Moments(mirror(known.hessian / known.fisher.tokens), known.fisher.tokens)
            share = known.fisher.tokens / self.tokens  # an expert counts as often as it is used
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


def _dynamic(spec: QuantSpec) -> QuantSpec:
    """Static scales are not chosen yet: those of the batch at hand stand for them."""
    return spec if spec.dynamic else replace(spec, dynamic=True, range=MinMax(), clusters=0)


def _sums(recorder: Recorder, quantizers: Mapping[str, InputQuantizer]) -> dict[Key, _Sums]:
    with torch.no_grad():
        return {key: _Sums.of(x, g, back, quantizers.get(key.name)) for key, x, g, back in recorder.found()}


def _collect(totals: dict[Key, _Sums], found: Mapping[Key, _Sums]) -> None:
    for key, sums in found.items():
        if key in totals:
            totals[key].add(sums)
        else:
            totals[key] = sums


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
