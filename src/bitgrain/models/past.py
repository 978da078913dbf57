"""What each layer of a model keeps of the past, found by running its skeleton, which holds no weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from bitgrain.errors import ModelError
from bitgrain.runtime.kv_cache import past_argument


@dataclass(frozen=True)
class Past:
    """One layer's keys and values: heads, channels of each, and the tokens of its window (None: all).

    index, path  its number in the cache, and the path of the module that fills it
    """

    heads: int
    key_size: int
    value_size: int
    window: int | None
    index: int = field(default=0, compare=False)
    path: str = field(default="", compare=False)

    def tokens(self, seen: int) -> int:
        """How many it holds of so many tokens."""
        return seen if self.window is None else min(seen, self.window - 1)


def find_past(skeleton: nn.Module) -> tuple[Past, ...]:
    """The layers that keep keys and values, in their order; `skeleton` from `build_skeleton`. None of a model that does
    not hand them back, as encoders.

    Raises ModelError for a model that cannot be run on a few tokens without weights.
    """
    config: Any = skeleton.config
    cache = DynamicCache(config=config)
    experts = [one for one in skeleton.modules() if any(p.ndim == 3 for p in one.parameters(recurse=False))]
    for module in experts:  # which expert runs depends on numbers, and there are none; shapes stay as they are
        module.forward = _hand_on  # type: ignore[method-assign]
    try:
        with torch.no_grad(), _noting(skeleton, cache) as paths:
            ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
            found = skeleton(input_ids=ids, use_cache=True, **{past_argument(skeleton): cache})
    except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"{type(skeleton).__name__} cannot be run without weights ({error})") from error
    finally:
        for module in experts:
            del module.forward
    if getattr(found, past_argument(skeleton), None) is None:
        return ()
    return tuple(
        _past(layer, index, paths.get(index, ""))
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized
    )


@contextmanager
def _noting(skeleton: nn.Module, cache: DynamicCache) -> Generator[dict[int, str]]:
    """By layer of the cache, the path of the innermost module that is running when it is filled."""
    paths: dict[int, str] = {}
    running: list[str] = []
    update = cache.update

    def noted(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        paths[layer_idx] = running[-1]
        return update(keys, values, layer_idx, *args, **kwargs)

    def enter(path: str) -> Any:
        return lambda *_: running.append(path)

    def leave(*_: Any) -> None:
        running.pop()

    cache.update = noted  # type: ignore[method-assign]
    modules = list(skeleton.named_modules())
    hooks = [module.register_forward_pre_hook(enter(path)) for path, module in modules]
    hooks += [module.register_forward_hook(leave) for _, module in modules]
    try:
        yield paths
    finally:
        for hook in hooks:
            hook.remove()


def _hand_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _past(layer: CacheLayerMixin, index: int, path: str) -> Past:
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    window = int(getattr(layer, "sliding_window", 0)) or None
    return Past(keys.shape[1], keys.shape[-1], values.shape[-1], window, index, path)
