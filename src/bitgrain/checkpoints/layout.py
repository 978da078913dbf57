"""What every on-disk layout answers: can it hold this layer, which tensors does it take, and how are they filled.

One file for each layout. A layout knows nothing of models: it sees one quantized layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.numerics import Format, QTensor, QuantSpec
from bitgrain.numerics.observers import StaticInput
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes import Scheme

Read = Callable[[str], Tensor]
"""Gives the tensor of a name on disk."""


@dataclass(frozen=True)
class StoredLayer:
    """A weight that is to be, or has been, stored quantized.

    tensor        its name in the original checkpoint; module: the same without ".weight"
    memory_module the module in memory that owns it, of class class_name
    out_features, in_features: of one matrix; experts: matrices stacked in the tensor (1 unless it is 3-D)
    transposed    the original stores [in, out]; codes are always stored [out, in]
    dtype         of the original
    original      shape of the tensor, where it is seen as a matrix and is none: a convolution's [out, in, *kernel]
    input_global_scale  1 / the shared scale of nested input scales (NVFP4), where a file has another than ours
    """

    tensor: str
    module: str
    memory_module: str
    class_name: str
    role: str
    out_features: int
    in_features: int
    experts: int
    transposed: bool
    dtype: torch.dtype
    scheme: Scheme
    original: tuple[int, ...] = ()
    input_global_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of one matrix, as it is quantized."""
        return self.out_features, self.in_features

    @property
    def elements(self) -> int:
        return self.experts * self.out_features * self.in_features

    @property
    def static_input(self) -> QuantSpec | None:
        """The spec of inputs with scales from calibration, which are stored; None where there are none."""
        spec = self.scheme.input
        return None if spec is None or spec.dynamic else spec


class Layout(Protocol):
    """A way to lay quantized layers out in safetensors files and config.json.

    name  as `--to` and `--layout` have it; summary: whose it is and what it holds, for tables
    keys  of config.json under which `config` lies
    storages  of plain scales that its readers take, what a float32 model gets first; empty: float32, float16, bfloat16
    """

    name: str
    summary: str
    keys: tuple[str, ...]
    storages: tuple[Format, ...]

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json is in this layout."""
        ...

    def read_layers(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> list[StoredLayer]:
        """Every quantized layer of a checkpoint that is `recognised`, from its config.json and headers.

        Raises CheckpointError for what is damaged or unknown.
        """
        ...

    def refusal(self, layer: StoredLayer) -> str | None:
        """Why this layout cannot hold `layer`, or None."""
        ...

    def spellings(self, layer: StoredLayer) -> Iterable[QuantSpec]:
        """Weight specs that this layout holds and that may say what `layer` says, the nearest first: conversion takes
        the first under which no number changes (`numerics.respell`). Its own spec comes first where it is held."""
        ...

    def tensors(self, layer: StoredLayer) -> list[TensorSpec]:
        """The tensors that `layer` takes on disk, exactly."""
        ...

    def encode(
        self, layer: StoredLayer, parts: Sequence[QTensor], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        """Those tensors, filled; `parts` has one QTensor for each stacked matrix, and so has `inputs` the scales of
        static input specs (nothing otherwise: ValueError)."""
        ...

    def decode_packed(self, layer: StoredLayer, read: Read) -> list[PackedMatrix]:
        """The inverse of `encode`, with the codes left packed."""
        ...

    def decode(self, layer: StoredLayer, read: Read) -> list[QTensor]:
        """The inverse of `encode`."""
        ...

    def decode_inputs(self, layer: StoredLayer, read: Read) -> list[StaticInput]:
        """The static input scales, one for each stacked matrix; empty where inputs are dynamic or not quantized."""
        ...

    def decode_columns(self, layer: StoredLayer, read: Read) -> list[Tensor]:
        """Which columns each stacked matrix keeps in 16 bits, int32 [k]; empty where none are."""
        ...

    def config(self, layers: Sequence[StoredLayer], kept: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """What config.json says under `keys`; `kept`: (module, memory module, class) of matrices kept. Raises
        SchemeError for layers that it holds, but not in one checkpoint."""
        ...


@runtime_checkable
class PackedLayout(Protocol):
    """A layout that also takes codes packed, where that is less work than `encode`."""

    def encode_packed(
        self, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
    ) -> dict[str, Tensor]:
        """As `Layout.encode`."""
        ...


def encode_packed(
    layout: Layout, layer: StoredLayer, parts: Sequence[PackedMatrix], inputs: Sequence[StaticInput] = ()
) -> dict[str, Tensor]:
    """`Layout.encode` of packed matrices, unpacked only where the layout needs that."""
    if isinstance(layout, PackedLayout):
        return layout.encode_packed(layer, parts, inputs)
    return layout.encode(layer, [one.unpack() for one in parts], inputs)


def check_inputs(layer: StoredLayer, inputs: Sequence[StaticInput]) -> None:
    """ValueError unless there is a static input scale for each matrix of a layer that stores them, else none."""
    needed = layer.experts if layer.static_input is not None else 0
    if len(inputs) != needed:
        raise ValueError(f"{layer.module} stores {needed} static input scales, {len(inputs)} are given")
