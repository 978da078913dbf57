"""A checkpoint under its original names, whatever its layout: what loading, converting and checking need of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.naming import StoredTensor
from bitgrain.numerics import QTensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.kv_cache import CacheScheme


class StoredModel(ABC):
    """A checkpoint as its original names: which layers are quantized, and every tensor dequantized.

    path    of the folder, or the GGUF file
    kind    the layout's name; "safetensors" for a plain checkpoint
    model_config   config.json, without what a layout puts there; config: what it puts there
    layers  the quantized tensors
    Numbers of a quantized tensor are meant in the dtype of its layer.
    """

    path: Path
    kind: str
    model_config: Mapping[str, Any]
    config: Mapping[str, Any]
    layers: Mapping[str, StoredLayer]

    @abstractmethod
    def quantized(self, tensor: str) -> list[QTensor]:
        """The QTensors of an original tensor, one for each stacked matrix."""

    @abstractmethod
    def packed(self, tensor: str) -> list[PackedMatrix]:
        """The same with their codes left packed."""

    @abstractmethod
    def inputs(self, tensor: str) -> list[StaticInput]:
        """The static input scales of a quantized tensor, one for each stacked matrix; none where it has none."""

    @abstractmethod
    def columns(self) -> dict[str, list[Tensor]]:
        """Which columns every layer keeps that does so beside quantized inputs, one index for each stacked matrix."""

    @abstractmethod
    def read(self, tensor: str) -> Tensor:
        """A tensor that was not quantized, in its stored dtype."""

    @abstractmethod
    def cache(self, trust_remote_code: bool = False) -> CacheScheme | None:
        """How keys and values are kept, with the scales of each layer; None: as they are."""

    @abstractmethod
    def kept(self) -> list[str]:
        """Names of the tensors that were not quantized."""

    @abstractmethod
    def originals(self) -> Mapping[str, StoredTensor]:
        """Shapes and dtypes under the original names, as `read_anatomy` wants them, in natural order."""

    @abstractmethod
    def nbytes(self, tensor: str) -> int:
        """Bytes that an original tensor takes on disk, scales and all."""

    @abstractmethod
    def side_files(self, with_code: bool) -> dict[str, bytes]:
        """What stands beside weights and config.json: tokenizer, chat template, licences, ..."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the source to a resumed job."""

    def static_inputs(self) -> dict[str, list[StaticInput]]:
        """The static input scales of every layer that has them, by original tensor, one for each stacked matrix."""
        return {name: self.inputs(name) for name, layer in self.layers.items() if layer.static_input is not None}

    def dense(self, tensor: str) -> Tensor:
        """An original tensor, dequantized where it is quantized, in its original shape and dtype."""
        layer = self.layers.get(tensor)
        if layer is None:
            return self.read(tensor)
        parts = [q.dequantize(layer.dtype) for q in self.quantized(tensor)]
        if layer.original:
            return parts[0].view(layer.original)
        parts = [part.T if layer.transposed else part for part in parts]
        return torch.stack(parts) if layer.experts > 1 else parts[0].contiguous()
