"""Quantized attention; importing it makes `attn_implementation="bitgrain_..."` known to transformers."""

from bitgrain.runtime.attention.register import attention_of, implementation_name, register_attention, set_attention
from bitgrain.runtime.attention.schemes import SCHEMES, AttentionScheme, get_attention_scheme
from bitgrain.runtime.attention.tiled import attend

register_attention()

__all__ = [
    "SCHEMES",
    "AttentionScheme",
    "attend",
    "attention_of",
    "get_attention_scheme",
    "implementation_name",
    "register_attention",
    "set_attention",
]
