"""What a loaded model gets beside its layers: its cache, its attention, and native calls for whole decoder layers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bitgrain.models.fused_blocks import fuse_blocks
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.execution import Execution
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.runtime.attention import AttentionScheme, set_attention
from bitgrain.runtime.dense_head import multiply_few_rows_natively
from bitgrain.runtime.kv_cache import CacheScheme, KVCache, get_cache_scheme, use_cache
from bitgrain.runtime.kv_cache.growing import GrowingCache
from bitgrain.runtime.saving import refuse_to_save_packed


def equip(
    model: nn.Module,
    folder: str | Path,
    trust_remote_code: bool = False,
    kv_cache: str | CacheScheme | None = None,
    attention: str | AttentionScheme | None = None,
    execution: Execution = "kernels",
) -> None:
    """Of a model with the layers of the checkpoint `folder`, in place; arguments as of `load.load`."""
    refuse_to_save_packed(model)
    scheme = cache_for(folder, kv_cache, trust_remote_code)
    if scheme is not None:
        config = model.config
        KVCache(scheme, config)  # what cannot be is said now
        use_cache(model, partial(KVCache, scheme, config))
    if attention is not None:
        set_attention(model, attention)
    if execution == "kernels" and fuse_blocks(model):
        parts: Any = model
        multiply_few_rows_natively(parts.get_output_embeddings())
        plain = parts.config
        if scheme is None:
            use_cache(model, partial(GrowingCache, plain))


def cache_for(
    model: str | Path | nn.Module, wanted: str | CacheScheme | None, trust_remote_code: bool = False
) -> CacheScheme | None:
    """The scheme `wanted`, with the scales of the checkpoint `model` if those are of it; None: that of the checkpoint.

    "none", or a checkpoint without: None. Raises SchemeError for an unknown name, CheckpointError for lost scales.
    """
    if wanted == "none":
        return None
    known = None if wanted is None else get_cache_scheme(wanted)
    if isinstance(wanted, CacheScheme) or isinstance(model, nn.Module):
        return known
    path = resolve_model(model).path
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not (raw.get("quantization_config") or {}).get("kv_cache_scheme"):
        return known
    stored = QuantizedCheckpoint(path).cache(trust_remote_code)
    return stored if known is None or (stored is not None and known.name == stored.name) else known
