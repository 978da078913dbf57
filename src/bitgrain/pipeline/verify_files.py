"""Checkpoints that are files and not folders of safetensors: GGUF by the gguf package, ONNX by onnxruntime."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.types import get_type
from bitgrain.errors import PlanError
from bitgrain.pipeline.checks import Check
from bitgrain.pipeline.foreign_check import check_logits
from bitgrain.pipeline.readers.base import Reader
from bitgrain.pipeline.readers.registry import get_reader

ONNX = "onnx-qdq"
"""Either form: whoever reads one reads both."""


def verify_gguf(path: Path, readers: list[Reader]) -> list[Check]:
    """Every tensor of a GGUF file as the gguf package dequantizes it, and the logits of `readers`."""
    checks = [_tensors(path)]
    return checks + [check_logits(path, "gguf", reader, path) for reader in readers]


def verify_onnx(folder: Path, against: Path | None, readers: list[Reader]) -> list[Check]:
    """The logits of `readers` (onnxruntime, if none is named) beside those of the checkpoint that was converted.

    Raises PlanError where that is not told.
    """
    if against is None:
        raise PlanError(f"{folder} is an ONNX model: name the checkpoint that it was made of (--against)")
    asked = readers or [get_reader("onnxruntime")]
    return [check_logits(folder, ONNX, reader, against) for reader in asked]


def _tensors(path: Path) -> Check:
    name = "tensors"
    try:
        library: Any = import_module("gguf")
    except ImportError:
        return Check(name, None, "gguf is not installed: pip install gguf")
    ours, theirs = open_gguf(path), {one.name: one for one in library.GGUFReader(str(path)).tensors}
    wrong = [tensor for tensor in ours.tensors if tensor not in theirs]
    for tensor, entry in ours.tensors.items():
        if tensor in wrong:
            continue
        dense = torch.from_numpy(library.quants.dequantize(theirs[tensor].data, theirs[tensor].tensor_type).copy())
        kind, data = get_type(entry.type), ours.read(tensor)
        if kind.spec is None:
            mine = kind.values(data, entry.shape).float()
        else:
            mine = kind.unpack(data, (dense.shape[0], dense.shape[-1])).dequantize()
        if not torch.equal(mine.reshape(-1), dense.float().reshape(-1)):
            wrong.append(tensor)
    detail = f"{len(ours.tensors)} tensors as the gguf package dequantizes them"
    return Check(name, not wrong, f"not the same numbers: {', '.join(wrong[:3])}" if wrong else detail)
