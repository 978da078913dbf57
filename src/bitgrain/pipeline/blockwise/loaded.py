"""The whole quantized model in memory, as solved so far: for stages that learn from its predictions by gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitgrain.models.naming import convert_tensors
from bitgrain.models.stream import StreamedModel, call_options
from bitgrain.numerics import QTensor
from bitgrain.numerics.columns import Columns
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.outliers import Outliers
from bitgrain.pipeline.blockwise.local import whole_tensor
from bitgrain.pipeline.blockwise.work import OUTSIDE, TUNED, Work, block_file, latent_file
from bitgrain.pipeline.layers import matrices, to_cpu
from bitgrain.pipeline.load import attach_input_quantizers
from bitgrain.pipeline.plan import Plan


class LoadedModel:
    """Fills the model of `stream` with everything as `work` holds it.

    start   the QTensors, "name#i" for matrix i of a tensor; gains: those of the norms, float32
    inputs  the static scales of inputs, by original tensor
    """

    def __init__(self, plan: Plan, work: Work, stream: StreamedModel) -> None:
        self.plan, self.stream = plan, stream
        self.start: dict[str, QTensor] = {}
        self.gains: dict[str, Tensor] = {}
        self.inputs: dict[str, list[StaticInput]] = {}
        self._columns: dict[str, list[Tensor]] = {}
        self._work = work
        self._overlay = work.keys(TUNED) if work.has(TUNED) else set[str]()
        for index in (*range(len(stream.anatomy.block_names)), None):
            self._load(index)
        schemes = {name: layer.scheme for name, layer in plan.quantized.items()}
        attach_input_quantizers(stream.model, plan.anatomy, schemes, static=self.inputs, columns=self._columns)
        self._parameters = {name: _memory_name(plan, name) for name in self.gains}

    def logits(self, dense: Mapping[str, Tensor], gains: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Of token ids [batch, tokens] with other weights (dense float32, by the names of `start`) and gains."""
        tensors = {name: whole_tensor(dense, name, layer) for name, layer in self.plan.quantized.items()}
        replaced = convert_tensors(self.stream.model, {**self._joined(tensors), **tensors})
        replaced.update({self._parameters[name]: gain for name, gain in gains.items()})
        given = {"input_ids": ids.to(self.stream.device), **call_options(self.stream.model)}
        output: Any = functional_call(self.stream.model, replaced, kwargs=given)
        return output.logits

    def encode(self, qtensors: Mapping[str, QTensor], gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they will be written."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.plan.quantized.items():
            if f"{name}#0" in qtensors:
                parts = [to_cpu(qtensors[f"{name}#{i}"]) for i in range(layer.experts)]
                tensors.update(self.plan.layout.encode(layer, parts, self.inputs.get(name, ())))
        for name, gain in gains.items():
            tensors[name] = gain.to("cpu", self.plan.checkpoint.entries[name].dtype)
        return tensors

    def originals(self) -> dict[str, Tensor]:
        """The weights that were rounded, as transforms left them, by the names of `start`; those that are known."""
        found: dict[str, Tensor] = {}
        for name, layer in self.plan.quantized.items():
            file = self._file(name)
            if name not in self._work.record(file).get("rewritten", []):
                whole = self.plan.checkpoint.read(name)
            elif self._work.has(latent_file(file)):
                whole = self._work.one(latent_file(file), name)
            else:
                continue
            for i, matrix in enumerate(matrices(whole, layer)):
                found[f"{name}#{i}"] = matrix.to(self.stream.device, torch.float32)
        return found

    def _file(self, name: str) -> str:
        block = self.plan.anatomy.block_of[name]
        return OUTSIDE if block is None else block_file(block)

    def _load(self, index: int | None) -> None:
        file = OUTSIDE if index is None else block_file(index)
        held = self._work.keys(file)
        dense: dict[str, Tensor] = {}
        for name in self.stream.names(index):
            layer = self.plan.quantized.get(name)
            if layer is None:
                dense[name] = self._read(file, name) if name in held else self.plan.checkpoint.read(name)
                continue
            read = partial(self._read, file)
            parts = self.plan.layout.decode(layer, read)
            if layer.static_input is not None:
                self.inputs[name] = self.plan.layout.decode_inputs(layer, read)
            if layer.scheme.weight.columns is not None:
                self._columns[name] = self.plan.layout.decode_columns(layer, read)
            for i, part in enumerate(parts):
                self.start[f"{name}#{i}"] = _to(part, self.stream.device)
            if index is None:  # the reference predicts with the head in full precision; the loss replaces it
                continue
            full = [part.dequantize(layer.dtype) for part in parts]
            full = [part.T.contiguous() if layer.transposed else part for part in full]
            dense[name] = torch.stack(full) if layer.experts > 1 else full[0]
        self.stream.put(dense)
        for name, tensor in dense.items():
            if name not in self.plan.quantized and _is_gain(self.plan, self.stream, name):
                self.gains[name] = tensor.to(self.stream.device, torch.float32)

    def _read(self, file: str, key: str) -> Tensor:
        where = TUNED if key in self._overlay else file
        return self._work.one(where, key)

    def _joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are kept but joined in memory with quantized ones."""
        weights = self.plan.anatomy.weights
        targets = {target for weight in weights if weight.tensor in tensors for target in weight.targets}
        return {
            weight.tensor: self.plan.checkpoint.read(weight.tensor).to(self.stream.device, torch.float32)
            for weight in weights
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
