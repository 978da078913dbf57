"""Keys and values with static scales, as a plan knows them: the attention modules that have some, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bitgrain.checkpoints.kv_scales import refusal, scale_tensors
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError, ModelError, PlanError
from bitgrain.models.anatomy import Anatomy
from bitgrain.models.past import find_past
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.runtime.kv_cache.schemes import CacheScheme


@dataclass(frozen=True)
class CachedLayer:
    """index: in the cache; block: of the model; module: the attention's name on disk."""

    index: int
    block: int
    module: str


@dataclass(frozen=True)
class CachePlan:
    """What becomes of keys and values."""

    scheme: CacheScheme
    layers: tuple[CachedLayer, ...]

    @property
    def tensors(self) -> list[TensorSpec]:
        """The scales on disk."""
        return [spec for layer in self.layers for spec in scale_tensors(layer.module, self.scheme)]


def plan_cache(scheme: CacheScheme, skeleton: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> CachePlan:
    """dtype: in which the checkpoint keeps its weights, and the scales.

    Raises PlanError where no file holds the scheme, or the model keeps no keys and values that could be calibrated.
    """
    reason = refusal(scheme)
    if reason is not None:
        raise PlanError(reason)
    storage = {torch.float16: FP16, torch.bfloat16: BF16}.get(dtype, FP32)
    scheme = replace(scheme, keys=scheme.keys.with_scale_dtype(storage), values=scheme.values.with_scale_dtype(storage))
    layers = cached_layers(skeleton, anatomy)
    if not layers:
        raise PlanError(f"{anatomy.architecture} keeps no keys and values of the past: leave kv_cache out")
    return CachePlan(scheme, layers)


def cached_layers(skeleton: nn.Module, anatomy: Anatomy) -> tuple[CachedLayer, ...]:
    """The attention modules inside blocks that fill a cache, in its order. Empty for a model that generates nothing."""
    if not cast(PreTrainedModel, skeleton).can_generate():
        return ()
    try:
        past = find_past(skeleton)
    except ModelError:
        return ()
    found: list[CachedLayer] = []
    for one in past:
        block = next((i for i, name in enumerate(anatomy.block_names) if one.path.startswith(f"{name}.")), None)
        if block is not None:
            found.append(CachedLayer(one.index, block, _on_disk(one.path, anatomy)))
    return tuple(found)


def stored_cache(scheme: CacheScheme, skeleton: nn.Module, anatomy: Anatomy, checkpoint: Checkpoint) -> CacheScheme:
    """`scheme` with the scales that a checkpoint holds. Raises CheckpointError for one that is missing."""
    found: dict[int, tuple[float, float]] = {}
    for layer in cached_layers(skeleton, anatomy):
        names = [spec.name for spec in scale_tensors(layer.module, scheme)]
        missing = [name for name in names if name not in checkpoint.entries]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing: config.json says that keys and values have static scales")
        key, value = (float(checkpoint.read(name)) for name in names)
        found[layer.index] = key, value
    return replace(scheme, scales=tuple(found.get(i) for i in range(max(found, default=-1) + 1)))


def _on_disk(path: str, anatomy: Anatomy) -> str:
    """The name on disk of a module in memory, from those of the weights inside."""
    for weight in anatomy.weights:
        inner = weight.memory_module.removeprefix(f"{path}.")
        if inner != weight.memory_module and weight.module.endswith(f".{inner}"):
            return weight.module.removesuffix(f".{inner}")
    return path
