"""Knowledge distillation (arXiv 1503.02531): the quantized model learns to predict what the full-precision one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import ModelError

_CHUNK = 1 << 26
"""Logits that are compared at a time, in bytes of float32."""


def kl_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model), mean over the tokens: a scalar, in nats, differentiable by `logits`.

    logits, teacher  [..., vocabulary], any float dtype; compared in float32, a few rows at a time
    """
    vocabulary = logits.shape[-1]
    rows = max(1, _CHUNK // (4 * vocabulary))
    total = logits.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(
        logits.reshape(-1, vocabulary).split(rows), teacher.reshape(-1, vocabulary).split(rows), strict=True
    ):
        expected = theirs.float().log_softmax(-1)
        total = total + (expected.exp() * (expected - mine.float().log_softmax(-1))).sum()
    return total / (logits.numel() // vocabulary)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of tokens given those before them: logits [batch, tokens, vocabulary], ids [batch, tokens]."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def distillation_loss(
    student: nn.Module, teacher: nn.Module, inputs: Mapping[str, Any], *, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the logits that both give for `inputs` (keyword arguments), mean over tokens.

    mask  bool [batch, tokens]: which tokens count; None: those of `inputs["attention_mask"]`, if there is one
    The teacher runs without gradients and in the mode that it is in. Raises ModelError for models without logits.
    """
    with torch.no_grad():
        expected = logits_of(teacher, teacher(**inputs))
    found = logits_of(student, student(**inputs))
    mask = inputs.get("attention_mask") if mask is None else mask
    if mask is not None and mask.shape == found.shape[:-1]:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return kl_divergence(found, expected)


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The logits in a model's output: the output itself, its `logits`, or its first element."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(model).__name__} gives no logits: pass a loss of your own")
    return output
