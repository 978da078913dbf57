"""A model in a GGUF file, as `stored_model.StoredModel` has it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.calibration.text import load_tokenizer
from bitgrain.checkpoints.gguf.model import GgufModel
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.naming import StoredTensor, natural_order
from bitgrain.numerics import QTensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.pipeline.stored_model import StoredModel
from bitgrain.recipes import Scheme
from bitgrain.runtime.kv_cache import CacheScheme


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype


class GgufCheckpoint(StoredModel):
    """See `stored_model.StoredModel`. Tensors of block types are the quantized ones, embeddings among them.

    Numbers of blocks are float32, as llama.cpp computes them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, "gguf"
        self._model = GgufModel(path)
        self.model_config = self._model.config
        self.config: Mapping[str, Any] = {}
        self.layers = {
            name: self._layer(name) for name in self._model.places if self._model.type(name).spec is not None
        }

    @property
    def has_tokenizer(self) -> bool:
        return self._model.file.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    def quantized(self, tensor: str) -> list[QTensor]:
        return [self._model.quantized(tensor)]

    def packed(self, tensor: str) -> list[PackedMatrix]:
        return [PackedMatrix.of(q) for q in self.quantized(tensor)]

    def inputs(self, tensor: str) -> list[StaticInput]:
        return []

    def columns(self) -> dict[str, list[Tensor]]:
        return {}

    def read(self, tensor: str) -> Tensor:
        return self._model.dense(tensor)

    def cache(self, trust_remote_code: bool = False) -> CacheScheme | None:
        return None

    def kept(self) -> list[str]:
        return [name for name in self._model.places if name not in self.layers]

    def originals(self) -> Mapping[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for name in natural_order(self._model.places):
            shape = self._model.shape(name)
            flipped = self._model.transposed(name)
            dtype = self._model.type(name).dtype or torch.float32
            found[name] = _Shape(shape[::-1] if flipped else shape, dtype)
        return found

    def nbytes(self, tensor: str) -> int:
        shape, block_type = self._model.shape(tensor), self._model.type(tensor)
        return math.prod(shape) // block_type.block_size * block_type.block_bytes

    def side_files(self, with_code: bool) -> dict[str, bytes]:
        """The tokenizer as transformers saves it; nothing where the file has none."""
        if not self.has_tokenizer:
            return {}
        tokenizer = load_tokenizer(self.path)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    def fingerprint(self) -> dict[str, Any]:
        info = self.path.stat()
        return {"file": {"size": info.st_size, "mtime_ns": info.st_mtime_ns}, "config": json.dumps(self.model_config)}

    def _layer(self, name: str) -> StoredLayer:
        rows, cols = self._model.shape(name)
        block_type, place = self._model.type(name), self._model.places[name]
        assert block_type.spec is not None
        flipped = self._model.transposed(name)
        module = name.removesuffix(".weight")
        role = {"token_embd.weight": "embedding", "output.weight": "lm_head"}.get(place.stem, "linear")
        return StoredLayer(
            tensor=name,
            module=module,
            memory_module=module,
            class_name="Embedding" if role == "embedding" else "Conv1D" if flipped else "Linear",
            role=role if place.expert is None else "expert",
            out_features=rows,
            in_features=cols,
            experts=1,
            transposed=flipped,
            dtype=torch.float32,
            scheme=Scheme(block_type.name, block_type.spec),
        )
