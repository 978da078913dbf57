"""Static scales of keys and values, from what the quantized blocks put into their cache on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import PlanError
from bitgrain.models.stream import Call, call_block
from bitgrain.numerics.observers import static_input
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.work import Work, block_file
from bitgrain.pipeline.cache_plan import CachedLayer, CachePlan
from bitgrain.runtime.kv_cache.observe import Observed, ObservingCache


def observe_cache(
    plan: CachePlan, index: int, block: nn.Module, hidden: Sequence[Tensor], calls: Sequence[Call], pool: Pool
) -> dict[str, Tensor]:
    """The scales of the attention modules of block `index`, by their names on disk; one more run of the block.

    hidden, calls  what enters the block and how it is called, batch by batch, each with an ObservingCache
    Raises NumericsError (NaN, Inf), PlanError for a module that the text does not reach.
    """

    def one(batch: int) -> dict[int, Observed]:
        cache = _cache_of(calls[batch])
        if cache is None:
            return {}
        cache.watching = True
        try:
            with torch.no_grad():
                call_block(block, hidden[batch], calls[batch])
        finally:
            cache.watching = False
        return {key: cache.seen.pop(key) for key in list(cache.seen)}

    seen: dict[int, Observed] = {}
    layers = [layer for layer in plan.layers if layer.block == index]
    if layers:
        for found in pool.map(one, range(len(hidden))):
            for key, observed in found.items():
                seen[key] = seen[key].merged(observed) if key in seen else observed
    scales: dict[str, Tensor] = {}
    for layer in layers:
        if layer.index not in seen:
            raise PlanError(f"{layer.module}: the calibration text puts no keys and values into its cache")
        scales |= _scales(plan, layer, seen[layer.index])
    return scales


def saved_scales(plan: CachePlan, work: Work) -> dict[str, Tensor]:
    """All scales, from the files of the blocks."""
    found: dict[str, Tensor] = {}
    for layer in plan.layers:
        found |= work.tensors(block_file(layer.block), [f"{layer.module}.k_scale", f"{layer.module}.v_scale"])
    return found


def _scales(plan: CachePlan, layer: CachedLayer, seen: Observed) -> dict[str, Tensor]:
    sides = (("k_scale", seen.keys, plan.scheme.keys), ("v_scale", seen.values, plan.scheme.values))
    return {
        f"{layer.module}.{suffix}": static_input(state, spec, f"{layer.module}.{suffix}").scale.reshape(1)
        for suffix, state, spec in sides
    }


def _cache_of(call: Call) -> ObservingCache | None:
    given: list[Any] = [*call.args, *call.kwargs.values()]
    return next((value for value in given if isinstance(value, ObservingCache)), None)
