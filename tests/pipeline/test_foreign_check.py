"""Logits of other readers beside ours, and what is said where there is no such reader."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.errors import PlanError, SchemeError
from bitgrain.pipeline.readers.compare import Apart
from bitgrain.pipeline.readers.registry import READERS, readers_of


def test_distances():
    ours = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    same = Apart.of(ours, torch.cat([ours, torch.zeros(2, 3, 6)], dim=-1))  # padding of the vocabulary
    assert (same.largest, same.equal()) == (0, True)
    assert not Apart.of(ours, ours + torch.randn(2, 3, 50)).equal()
    assert not Apart.of(ours, ours[:, :2]).equal()


def test_gguf_and_onnx_are_asked_of_their_engines(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "w8", "W8A16")
    bitgrain.convert(tiny("llama"), "gguf:f32", tmp_path / "x.gguf")
    checks = {one.name: one for one in bitgrain.verify(tmp_path / "x.gguf", readers=["transformers", "onnxruntime"])}
    assert checks["tensors"].ok
    assert checks["logits, transformers"].ok
    assert checks["logits, onnxruntime"].ok is None
    assert "does not read gguf" in checks["logits, onnxruntime"].detail
    bitgrain.convert(tmp_path / "w8", "onnx-qdq", tmp_path / "onnx")
    with pytest.raises(PlanError, match="name the checkpoint that it was made of"):
        bitgrain.verify(tmp_path / "onnx")
    (found,) = bitgrain.verify(tmp_path / "onnx", against=tmp_path / "w8")
    assert found.ok
    assert "onnxruntime" in found.detail


def test_a_file_that_says_something_else_fails(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "w2", "W2A16")
    bitgrain.quantize(tiny("llama"), tmp_path / "w8", "W8A16")
    bitgrain.convert(tmp_path / "w2", "onnx-qdq", tmp_path / "onnx")
    (found,) = bitgrain.verify(tmp_path / "onnx", against=tmp_path / "w8")
    assert found.ok is False


def test_unknown_readers_are_refused(tmp_path: Path):
    with pytest.raises(SchemeError, match="known readers: transformers"):
        bitgrain.verify(tmp_path, readers=["exllama"])
    assert {reader.name for reader in readers_of("gguf")} == {"transformers", "llama.cpp"}
    assert all(reader.layouts for reader in READERS.values())
