"""onnxruntime, on the CPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.pipeline.readers.base import Reader, ReaderError


def _logits(path: Path, ids: Tensor) -> Tensor:
    runtime: Any = import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
        given = {one.name: _input(one, ids) for one in session.get_inputs()}
        (found,) = session.run([session.get_outputs()[0].name], given)
    except (RuntimeError, ValueError) as error:  # its own errors are RuntimeErrors
        raise ReaderError(str(error).splitlines()[0]) from error
    return torch.from_numpy(found).float()


def _input(one: Any, ids: Tensor) -> Any:
    """What a decoder or encoder is given for whole texts without a past."""
    texts, tokens = ids.shape
    if one.name == "input_ids":
        return ids.numpy()
    if one.name == "attention_mask":
        return torch.ones_like(ids).numpy()
    if one.name == "token_type_ids":
        return torch.zeros_like(ids).numpy()
    if one.name == "position_ids":
        return torch.arange(tokens).expand(texts, -1).contiguous().numpy()
    dtype = torch.float16 if one.type == "tensor(float16)" else torch.float32
    shape = [texts if i == 0 else size if isinstance(size, int) else 0 for i, size in enumerate(one.shape)]
    return torch.zeros(shape, dtype=dtype).numpy()


READER = Reader("onnxruntime", "onnxruntime", "onnxruntime", ("onnx-qdq", "onnx-nbits"), _logits)
