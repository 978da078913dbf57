"""Tuning one block: rounding, ranges or scales, such that its output comes near that of the full-precision block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.naming import convert_tensors
from bitgrain.models.stream import Call
from bitgrain.numerics import QTensor
from bitgrain.pipeline.blockwise.batches import single_threaded
from bitgrain.pipeline.layers import matrices
from bitgrain.solvers.base import make_with_settings
from bitgrain.tuning.blockwise import BlockSettings, tune_block


def block_settings(given: Mapping[str, Any]) -> BlockSettings:
    """The settings of a recipe's `tuning.blockwise`; a calibration batch is several windows, so one is a step.

    Raises SchemeError for a setting that does not exist.
    """
    return make_with_settings(BlockSettings, {"batch_size": 1, "validation": 4, **given}, "tuning.blockwise")


def tune_locally(
    model: nn.Module,
    block: nn.Module,
    prefix: str,
    layers: Mapping[str, StoredLayer],
    originals: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[QTensor]],
    inputs: Sequence[Tensor],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    settings: BlockSettings,
) -> tuple[dict[str, list[QTensor]], dict[str, Any]]:
    """New QTensors for the layers of a block, and the record of the tuning.

    model      the whole model, for the names in memory; prefix: the block's path in it with a dot
    originals  the weights before they were quantized, as on disk; beside: tensors joined in memory with them
    inputs     hidden states that enter the block, batch by batch; targets: the outputs of the full-precision block
    """
    start = {f"{name}#{i}": part for name, of in parts.items() for i, part in enumerate(of)}
    weights = {
        f"{name}#{i}": matrix.to(targets[0].device, torch.float32)
        for name, layer in layers.items()
        for i, matrix in enumerate(matrices(originals[name], layer))
    }

    def output(dense: Mapping[str, Tensor], batch: int) -> Tensor:
        tensors = {name: whole_tensor(dense, name, layer) for name, layer in layers.items()}
        memory = convert_tensors(model, {**beside, **tensors})
        replaced = {name.removeprefix(prefix): tensor for name, tensor in memory.items()}
        call = calls[batch]
        named = {} if call.by_name is None else {call.by_name: inputs[batch]}
        first = (inputs[batch],) if call.by_name is None else ()
        result: Any = functional_call(block, replaced, (*first, *call.args), {**named, **call.kwargs})
        return result[0] if isinstance(result, tuple) else result

    with single_threaded(), torch.enable_grad():
        found = tune_block(weights, start, output, lambda batch: targets[batch], len(inputs), settings)
    tuned = {name: [found.qtensors[f"{name}#{i}"] for i in range(len(of))] for name, of in parts.items()}
    record = {"error_before": found.first_loss, "error_after": found.best_loss, "steps": found.steps}
    return tuned, record


def whole_tensor(dense: Mapping[str, Tensor], name: str, layer: StoredLayer) -> Tensor:
    """A tensor as on disk from its matrices "name#i" [out, in], differentiable."""
    parts = [dense[f"{name}#{i}"] for i in range(layer.experts)]
    parts = [part.mT if layer.transposed else part for part in parts]
    return torch.stack(parts) if layer.experts > 1 else parts[0]
