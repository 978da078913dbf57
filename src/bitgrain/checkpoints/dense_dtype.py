"""The dtype that a quantized model's weights had, where its layout does not say."""

from __future__ import annotations

import torch

from bitgrain.checkpoints.reader import Checkpoint

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dense_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The commonest among the weights and biases that were kept; bfloat16 where there are none."""
    kept = [entry.dtype for name, entry in checkpoint.entries.items() if name.endswith((".weight", ".bias"))]
    floats = [dtype for dtype in kept if dtype in _FLOATS]
    return max(set(floats), key=floats.count) if floats else torch.bfloat16
