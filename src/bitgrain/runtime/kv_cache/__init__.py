"""Quantized caches of keys and values."""

from bitgrain.runtime.kv_cache.cache import KVCache, past_argument, use_cache
from bitgrain.runtime.kv_cache.past import register_decode_attention
from bitgrain.runtime.kv_cache.schemes import SCHEMES, CacheScheme, get_cache_scheme

register_decode_attention()

__all__ = ["SCHEMES", "CacheScheme", "KVCache", "get_cache_scheme", "past_argument", "use_cache"]
