"""Tuning the whole quantized model: scales and norm gains by the KL divergence from the full-precision model."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitgrain.errors import ModelError
from bitgrain.models.naming import convert_tensors
from bitgrain.models.stream import StreamedModel
from bitgrain.numerics import QTensor
from bitgrain.numerics.columns import Columns
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.outliers import Outliers
from bitgrain.pipeline.blockwise.batches import single_threaded
from bitgrain.pipeline.blockwise.local import whole_tensor
from bitgrain.pipeline.blockwise.work import OUTSIDE, Work, block_file
from bitgrain.pipeline.layers import matrices, to_cpu
from bitgrain.pipeline.load import attach_input_quantizers
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.solvers.base import make_with_settings
from bitgrain.tuning.end_to_end import EndToEndSettings, tune_end_to_end

WINDOWS = 4
"""Calibration windows in one gradient step."""
_CODES_BELOW = 2.75
"""Average bits below which codes are learned."""
_CHUNK = 1 << 26
"""Logits that are compared at a time, in bytes of float32."""


def settings_of(plan: Plan, rewritten: Collection[str] = ()) -> EndToEndSettings:
    """The recipe's settings; rates of scales and gains are in units of each grid's step already (`EndToEndSettings`).

    Codes are learned too where there are less than three bits: only there it was worth its time. They need the weights
    that were rounded, which are gone where transforms had `rewritten` them.
    Raises SchemeError for a setting that does not exist.
    """
    elements = sum(layer.elements for layer in plan.quantized.values())
    total = sum(layer.elements * layer.scheme.weight.format.bits for layer in plan.quantized.values())
    step = 2.0 ** -(total / max(1, elements))
    rates: dict[str, float] = {}
    if total < _CODES_BELOW * elements and not rewritten:
        rates["code_rate"] = 0.004 * step
    given = {**rates, **(plan.recipe.tuning.end_to_end or {})}
    return make_with_settings(EndToEndSettings, given, "tuning.end_to_end")


def tune_whole(
    plan: Plan, work: Work, stream: StreamedModel, full: Sequence[Tensor], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as they will be written, of what the tuning changed, and its record for the manifest.

    full  the full-precision hidden states behind the last block, batch by batch
    Raises ModelError for a model without logits over a vocabulary.
    """
    assert plan.calibration is not None
    files = [OUTSIDE, *(block_file(i) for i in range(len(stream.anatomy.block_names)))]
    rewritten = {name for file in files for name in work.record(file).get("rewritten", [])}
    settings = settings_of(plan, rewritten)
    ids = plan.calibration.ids.split(WINDOWS)
    reference = _Reference(stream, list(ids), torch.cat(list(full)).split(WINDOWS))
    start, extras, inputs = _load(plan, work, stream)
    parameters = {name: _memory_name(plan, name) for name in extras}
    layers = plan.quantized

    def loss(dense: Mapping[str, Tensor], gains: Mapping[str, Tensor], index: int) -> Tensor:
        tensors = {name: whole_tensor(dense, name, layer) for name, layer in layers.items()}
        replaced = convert_tensors(stream.model, {**_joined(plan, stream, tensors), **tensors})
        replaced.update({parameters[name]: gain for name, gain in gains.items()})
        output: Any = functional_call(stream.model, replaced, kwargs={"input_ids": ids[index].to(stream.device)})
        return reference.divergence(output.logits, index)

    progress.start(settings.steps, "steps", f"tune {plan.source.name}")
    try:
        with single_threaded():
            found = tune_end_to_end(
                start,
                extras,
                loss,
                len(ids),
                settings,
                weights=_originals(plan, stream, rewritten) if settings.code_rate else None,
                progress=lambda _, kl: progress.advance(1, f"KL {kl:.5f}"),
            )
    finally:
        progress.finish()
    tensors: dict[str, Tensor] = {}
    for name, layer in plan.quantized.items():
        if f"{name}#0" in found.qtensors:
            parts = [to_cpu(found.qtensors[f"{name}#{i}"]) for i in range(layer.experts)]
            tensors.update(plan.layout.encode(layer, parts, inputs.get(name, ())))
    for name, gain in found.extras.items():
        tensors[name] = gain.to("cpu", plan.checkpoint.entries[name].dtype)
    record = {"kl_before": found.first_loss, "kl_after": found.best_loss, "steps": found.steps}
    return tensors, record


def _originals(plan: Plan, stream: StreamedModel, rewritten: Collection[str]) -> dict[str, Tensor]:
    """The weights before they were quantized, by the names of their QTensors, without the `rewritten`."""
    return {
        f"{name}#{i}": matrix.to(stream.device, torch.float32)
        for name, layer in plan.quantized.items()
        if name not in rewritten
        for i, matrix in enumerate(matrices(plan.checkpoint.read(name), layer))
    }


class _Reference:
    """The full-precision model's predictions, from its last hidden states."""

    def __init__(self, stream: StreamedModel, ids: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        self._stream, self._ids, self._hidden = stream, ids, hidden

    def divergence(self, logits: Tensor, index: int) -> Tensor:
        """KL(full || quantized), mean over the tokens of a batch."""
        with torch.no_grad(), _inputs_as_they_are(self._stream.model):
            output = self._stream.tail(self._ids[index], self._hidden[index])
            if getattr(output, "logits", None) is None:
                raise ModelError(f"{self._stream.anatomy.architecture} predicts no tokens; leave tuning.end_to_end out")
            base: Tensor = output.logits.float()
        vocabulary = logits.shape[-1]
        rows = max(1, _CHUNK // (4 * vocabulary))
        total = logits.new_zeros((), dtype=torch.float32)
        for mine, theirs in zip(
            logits.reshape(-1, vocabulary).split(rows), base.reshape(-1, vocabulary).split(rows), strict=True
        ):
            expected = theirs.log_softmax(-1)
            total = total + (expected.exp() * (expected - mine.float().log_softmax(-1))).sum()
        return total / (logits.numel() // vocabulary)


@contextmanager
def _inputs_as_they_are(model: nn.Module) -> Generator[None]:
    """Without the input quantizers: these belong to the quantized model, also where they stand before the head."""
    quantizers = [module for module in model.modules() if isinstance(module, InputQuantizer)]
    for quantizer in quantizers:
        quantizer.forward = lambda x: x  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward


def _load(
    plan: Plan, work: Work, stream: StreamedModel
) -> tuple[dict[str, QTensor], dict[str, Tensor], dict[str, list[StaticInput]]]:
    """Fill the model with everything as solved so far; the QTensors ("name#i" for matrix i), the norms' gains, and the
    static scales of inputs."""
    start: dict[str, QTensor] = {}
    inputs: dict[str, list[StaticInput]] = {}
    columns: dict[str, list[Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for index in (*range(len(stream.anatomy.block_names)), None):
        file = OUTSIDE if index is None else block_file(index)
        held = work.keys(file)
        dense: dict[str, Tensor] = {}
        for name in stream.names(index):
            layer = plan.quantized.get(name)
            if layer is None:
                dense[name] = work.tensors(file, [name])[name] if name in held else plan.checkpoint.read(name)
                continue
            read = partial(read_one, work, file)
            parts = plan.layout.decode(layer, read)
            if layer.static_input is not None:
                inputs[name] = plan.layout.decode_inputs(layer, read)
            if layer.scheme.weight.columns is not None:
                columns[name] = plan.layout.decode_columns(layer, read)
            for i, part in enumerate(parts):
                start[f"{name}#{i}"] = _to(part, stream.device)
            if index is None:  # the reference predicts with the head in full precision; the loss replaces it
                continue
            full = [part.dequantize(layer.dtype) for part in parts]
            full = [part.T.contiguous() if layer.transposed else part for part in full]
            dense[name] = torch.stack(full) if layer.experts > 1 else full[0]
        stream.put(dense)
        for name, tensor in dense.items():
            if name not in plan.quantized and _is_gain(plan, stream, name):
                extras[name] = tensor.to(stream.device, torch.float32)
    schemes = {name: layer.scheme for name, layer in plan.quantized.items()}
    attach_input_quantizers(stream.model, plan.anatomy, schemes, static=inputs, columns=columns)
    return start, extras, inputs


def read_one(work: Work, file: str, key: str) -> Tensor:
    """A tensor of a file, as `Layout.decode` asks for it."""
    return work.tensors(file, [key])[key]


def _joined(plan: Plan, stream: StreamedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are kept but joined in memory with quantized ones."""
    targets = {target for weight in plan.anatomy.weights if weight.tensor in tensors for target in weight.targets}
    return {
        weight.tensor: plan.checkpoint.read(weight.tensor).to(stream.device, torch.float32)
        for weight in plan.anatomy.weights
        if weight.tensor not in tensors and targets.intersection(weight.targets)
    }


def _is_gain(plan: Plan, stream: StreamedModel, name: str) -> bool:
    """Whether a tensor is the gain of a norm, known by its module's class."""
    memory = _memory_name(plan, name)
    owner, _, leaf = memory.rpartition(".")
    if leaf != "weight" or len(plan.checkpoint.entries[name].shape) != 1:
        return False
    module = stream.model.get_submodule(owner)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("Norm")


def _memory_name(plan: Plan, name: str) -> str:
    return plan.anatomy.memory_of.get(name, name)


def _to(q: QTensor, device: torch.device) -> QTensor:
    changed: dict[str, Any] = {}
    for field in fields(q):
        value = getattr(q, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.to(device)
        elif isinstance(value, QTensor):
            changed[field.name] = _to(value, device)
        elif isinstance(value, Outliers | Columns):
            changed[field.name] = value.to(device)
        else:
            changed[field.name] = value
    return QTensor(**changed)
