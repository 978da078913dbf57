"""Quantized attention under transformers' attention interface: `attn_implementation="bitgrain_int8"` and its kin."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from bitgrain.errors import ModelError
from bitgrain.runtime.attention.schemes import SCHEMES, AttentionScheme, get_attention_scheme
from bitgrain.runtime.attention.tiled import attend
from bitgrain.runtime.operators import Operator, find_operator, register_operator


def implementation_name(scheme: AttentionScheme) -> str:
    """What transformers calls it: int8-fp8 is `bitgrain_int8_fp8`."""
    return "bitgrain_" + scheme.name.replace("-", "_")


def register_attention() -> None:
    """Make every scheme known to transformers, and its reference to the operator table. Done when this package is
    imported; twice does no harm."""
    for scheme in SCHEMES.values():
        register_operator(Operator("attention", scheme.formats, attend, reference=True))
        name = implementation_name(scheme)
        AttentionInterface.register(name, _forward(scheme))
        AttentionMaskInterface.register(name, _whole_mask)


def set_attention(model: Any, scheme: str | AttentionScheme) -> None:
    """Let a transformers model use quantized attention. Raises SchemeError, ModelError (a model that cannot)."""
    name = implementation_name(get_attention_scheme(scheme))
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError(f"{type(model).__name__} is not of transformers: it has no attention that could be replaced")
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} computes attention by itself: it cannot be replaced")


@contextmanager
def attention_of(model: Any, scheme: AttentionScheme | None) -> Generator[None]:
    """`set_attention` for as long as it lasts; None changes nothing."""
    if scheme is None:
        yield
        return
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    set_attention(model, scheme)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As for sdpa, but written out: windows and chunks are no case of their own then."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _forward(scheme: AttentionScheme) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if kwargs.get("position_bias") is not None:
            raise ModelError(
                f"{type(module).__name__} adds a bias to its scores, which {scheme.name} attention does not"
            )
        if dropout:
            raise ModelError(f"{scheme.name} attention is for inference: set the model to eval()")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        kernel = find_operator("attention", scheme.formats, query.device.type).kernel
        with torch.no_grad():
            found: Tensor = kernel(
                query,
                key,
                value,
                scheme,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                mask=attention_mask,
                causal=causal and attention_mask is None and query.shape[2] > 1,
                softcap=softcap,
                sinks=s_aux,
            )
        return found.transpose(1, 2).contiguous(), None

    return forward
