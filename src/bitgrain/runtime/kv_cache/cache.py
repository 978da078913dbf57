"""A cache of quantized keys and values for any transformers model that keeps them in layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from bitgrain.errors import ModelError, SchemeError
from bitgrain.runtime.kv_cache.layers import QuantizedLayer, QuantizedSlidingLayer
from bitgrain.runtime.kv_cache.schemes import CacheScheme, get_cache_scheme

Scales = Sequence[tuple[Tensor, Tensor] | None]
"""For each layer, the static scales of keys and values; None where it keeps none."""


class KVCache(Cache):
    """Pass it as `cache` (before transformers 5.24: `past_key_values`) to a model's `forward` or `generate`; one for
    each text or batch.

    scheme  a name of `schemes.SCHEMES`, or a CacheScheme
    config  the model's: which layers have a window, and which hold no keys at all, stands there
    scales  of static schemes, in place of the scheme's own
    Batches, padding, beams, windows, `crop`, `reorder_cache` and going on with a text work as with transformers' own.
    Raises SchemeError for an unknown scheme, and for a model with layers of a kind that cannot be quantized.
    """

    def __init__(self, scheme: str | CacheScheme, config: Any, scales: Scales | None = None) -> None:
        self.scheme = get_cache_scheme(scheme)
        super().__init__(layers=quantized_layers(self.scheme, config, scales))

    @property
    def nbytes(self) -> int:
        """Of all keys and values that are held, quantized or not yet."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedLayer))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Raises ModelError for a layer that the config does not tell of."""
        if layer_idx >= len(self.layers):
            raise ModelError(
                f"this cache has {len(self.layers)} layers, the model asks for number {layer_idx}: it was made for "
                "another model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def quantized_layers(scheme: CacheScheme, config: Any, scales: Scales | None = None) -> list[Any]:
    """What takes the place of transformers' layers for this config. Raises SchemeError, see `KVCache`."""
    plain = DynamicCache(config=config).layers
    if scales is None and scheme.scales:
        scales = [one and (torch.tensor([[one[0]]]), torch.tensor([[one[1]]])) for one in scheme.scales]
        scales += [None] * (len(plain) - len(scales))
    if scales is not None and len(scales) != len(plain):
        raise ModelError(f"there are scales of {len(scales)} layers for a model of {len(plain)}")
    found: list[Any] = []
    for index, layer in enumerate(plain):
        given = None if scales is None else scales[index]
        if type(layer) is DynamicLayer:
            found.append(QuantizedLayer(scheme, given))
        elif type(layer) is DynamicSlidingWindowLayer:
            found.append(QuantizedSlidingLayer(scheme, layer.sliding_window, given))
        elif isinstance(layer, CacheLayerMixin):
            kind = type(layer).__name__
            raise SchemeError(f"layer {index} keeps its past in a {kind}, which this version cannot quantize")
        else:  # no keys and values: convolutions, recurrences, layers that share those of others
            found.append(layer)
    return found


def past_argument(model: nn.Module) -> str:
    """The name under which the model's forward takes the past: `cache`, as transformers calls it from 5.24 on, or
    `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def use_cache(model: nn.Module, make: Callable[[], Cache]) -> None:
    """From now on `model` (of transformers) fills caches as `make` gives them wherever it would fill a plain one.

    An empty DynamicCache that is passed to it, as `generate` does, gets our layers. The model can be pickled if `make`
    can.
    """
    model.register_forward_pre_hook(_Caches(past_argument(model), make), with_kwargs=True)


class _Caches:
    """Before a model is called: the cache that it shall fill."""

    def __init__(self, name: str, make: Callable[[], Cache]) -> None:
        self._name, self._make = name, make

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get(self._name, kwargs.get("past_key_values"))
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(model.config, "use_cache", True)
        if given is None and wanted and not model.training:
            kwargs = {**kwargs, self._name: self._make()}
        elif type(given) is DynamicCache and not any(getattr(one, "is_initialized", True) for one in given.layers):
            given.layers = self._make().layers
            given.layer_class_to_replicate = None
        return args, kwargs
