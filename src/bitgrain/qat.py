"""Quantization-aware training in memory: `prepare`, train with any loop, `convert`, `save`.

    from bitgrain import qat

    teacher, model = load(...), load(...)
    qat.prepare(model, "W4A8")                     # fake quantizers with learned scales, in place
    for batch in batches:
        loss = qat.distillation_loss(model, teacher, batch)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    found = qat.convert(model)                     # QTensors; the model is as `quantize_` leaves it
    qat.save(found, model, "MODEL", "OUT")         # what `bitgrain quantize` writes

`qat.DistillationTrainer` is transformers' Trainer with that loss. From the command line, and for models that should be
started from GPTQ codes: `bitgrain train`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitgrain.pipeline.modules.qat import Converted, convert, is_prepared, prepare
from bitgrain.pipeline.modules.qat_files import save
from bitgrain.training.distillation import distillation_loss
from bitgrain.training.inputs import LearnedInput
from bitgrain.training.last_good import LastGood
from bitgrain.training.latent import FakeQuantizedWeight

if TYPE_CHECKING:
    from bitgrain.pipeline.modules.trainer import DistillationTrainer

__all__ = [
    "Converted",
    "DistillationTrainer",
    "FakeQuantizedWeight",
    "LastGood",
    "LearnedInput",
    "convert",
    "distillation_loss",
    "is_prepared",
    "prepare",
    "save",
]


def __getattr__(name: str) -> Any:
    """transformers' Trainer needs accelerate, so it is imported when it is used."""
    if name == "DistillationTrainer":
        return import_module("bitgrain.pipeline.modules.trainer").DistillationTrainer
    raise AttributeError(f"module 'bitgrain.qat' has no attribute {name!r}")
