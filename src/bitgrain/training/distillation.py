"""Knowledge distillation (arXiv 1503.02531): the quantized model learns to predict what the full-precision one does."""

from __future__ import annotations

import torch
from torch import Tensor

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


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of tokens given those before them: logits [batch, tokens, vocabulary], ids [batch, tokens]."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
