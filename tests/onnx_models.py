"""ONNX files of quantized models, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch


def session(folder: Path) -> onnxruntime.InferenceSession:
    """`folder`'s model on the CPU. onnxruntime would else round the inputs of 4-bit layers to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(model: onnxruntime.InferenceSession, ids: torch.Tensor, past: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every output by name; `past`: the outputs for the tokens before these."""
    batch, length = ids.shape
    seen = 0 if past is None else past["present.0.key"].shape[2]
    given: dict[str, Any] = {}
    for one in model.get_inputs():
        if one.name.startswith("past_key_values."):
            empty = np.zeros((batch, one.shape[1], 0, one.shape[3]), np.float32)
            given[one.name] = empty if past is None else past[one.name.replace("past_key_values", "present")]
        elif one.name == "input_ids":
            given[one.name] = ids.numpy()
        elif one.name == "position_ids":
            given[one.name] = np.broadcast_to(np.arange(seen, seen + length), ids.shape).copy()
        elif one.name == "token_type_ids":
            given[one.name] = np.zeros(ids.shape, np.int64)
        else:
            given[one.name] = np.ones((batch, seen + length), np.int64)
    return dict(zip((one.name for one in model.get_outputs()), model.run(None, given), strict=True))


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The mean KL divergence of the next token."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
