"""Static scales of keys and values on disk, as compressed-tensors and vLLM name them; both layouts use this form.

`quantization_config.kv_cache_scheme` (compressed-tensors QuantizationArgs) says the format; beside the weights of each
attention module `M` that keeps keys and values lie M.k_scale and M.v_scale, [1] in the checkpoint's dtype: a key is
stored as E4M3 of key / k_scale. vLLM reads them when it serves with `--kv-cache-dtype fp8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.formats import FP8_E4M3, FloatFormat
from bitgrain.runtime.kv_cache.schemes import SCHEMES, CacheScheme

SUFFIXES = ("k_scale", "v_scale")


def scale_tensors(module: str, scheme: CacheScheme) -> list[TensorSpec]:
    """The tensors of one attention module."""
    found: list[TensorSpec] = []
    for suffix, spec in zip(SUFFIXES, (scheme.keys, scheme.values), strict=True):
        assert isinstance(spec.scale, FloatFormat)
        assert spec.scale.torch_dtype is not None
        found.append(TensorSpec(f"{module}.{suffix}", spec.scale.torch_dtype, (1,)))
    return found


def refusal(scheme: CacheScheme) -> str | None:
    """Why no file holds this scheme, or None."""
    if not scheme.static:
        return (
            f"the KV cache {scheme.name} chooses its scales at run time, no file need know of it: leave it out, and "
            f"ask for it where the model is loaded or measured (load(kv_cache={scheme.name!r}), eval --kv-cache)"
        )
    return None if scheme.keys.format == scheme.values.format == FP8_E4M3 else f"the KV cache {scheme.name} is not fp8"


def config_of(scheme: CacheScheme) -> dict[str, Any]:
    """`kv_cache_scheme`."""
    spec: QuantSpec = scheme.keys
    return {
        "num_bits": spec.format.bits,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": "tensor",
        "dynamic": False,
        "observer": "mse" if spec.range.name == "mse" else "minmax",
    }


def read_scheme(config: Mapping[str, Any]) -> CacheScheme | None:
    """The scheme, still without scales, of a `quantization_config`; None if keys and values are not quantized.

    Raises CheckpointError for one that bitgrain does not know.
    """
    given = config.get("kv_cache_scheme")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise CheckpointError(f"kv_cache_scheme is {given!r}, not a scheme")
    wanted = config_of(SCHEMES["fp8"])
    told = {key: given.get(key, wanted[key]) for key in wanted if key != "observer"}
    if told != {key: value for key, value in wanted.items() if key != "observer"}:
        raise CheckpointError(f"kv_cache_scheme {dict(given)}: bitgrain reads static fp8 per tensor only")
    return SCHEMES["fp8"]
