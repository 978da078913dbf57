"""What happens inside decoder layers while a few tokens go through a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import eager_mask

from bitgrain.models.blocks import find_blocks
from bitgrain.runtime.fused_block import attention_interface, packed_weight
from bitgrain.runtime.kv_cache import past_argument

TOKENS = 7
"""Of the past; one more is watched."""

_OBSERVED = "bitgrain_observed"


@dataclass
class Call:
    """A module inside a block, as it was called with x."""

    path: str
    x: Tensor
    y: Tensor


@dataclass
class AttentionCall:
    """The call of transformers' attention interface."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Any]
    y: Tensor


@dataclass
class BlockTrace:
    """One layer in one step: x, arguments, calls inside in their order, what attention was given, y."""

    x: Tensor
    arguments: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    y: Tensor = field(default_factory=lambda: torch.empty(0))


def some_tokens(model: PreTrainedModel) -> Tensor:
    """[1, TOKENS + 1]."""
    inputs = cast(nn.Embedding, model.get_input_embeddings())
    ids = torch.arange(1, TOKENS + 2) * 7919 % inputs.num_embeddings
    return ids[None].to(inputs.weight.device)


def embedded_tokens(model: PreTrainedModel) -> Tensor:
    """In the dtype of the embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings())(some_tokens(model))


@contextmanager
def linears_in_float32(module: nn.Module) -> Generator[None]:
    """Dense linear layers of other dtypes take and give float32, as packed ones do."""
    changed = [
        one for one in module.modules()
        if type(one) is nn.Linear and one.weight.dtype != torch.float32 and "forward" not in one.__dict__
    ]  # fmt: skip
    try:
        for one in changed:
            cast(Any, one).forward = partial(_float32_linear, one)
        yield
    finally:
        for one in changed:
            one.__dict__.pop("forward", None)


def _float32_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = cast(Tensor | None, layer.bias)
    return F.linear(x, layer.weight.float(), None if bias is None else bias.float())


@torch.no_grad()
def watch_blocks(model: PreTrainedModel) -> dict[str, BlockTrace]:
    """Each decoder layer in a step of one token, behind a few others."""
    base = model.base_model
    inputs = model.get_input_embeddings()
    traces: dict[str, BlockTrace] = {}
    if not isinstance(inputs, nn.Embedding) or model.config.is_encoder_decoder or base is model:
        return traces
    names = [name for name, _ in model.named_parameters()]
    packed = [f"{path}.weight" for path, one in model.named_modules() if packed_weight(one) is not None]
    paths = find_blocks(model, [*names, *packed])
    embedded = embedded_tokens(model).float()
    cache = DynamicCache(config=model.config)
    arguments: dict[str, Any] = {past_argument(base): cache, "use_cache": True}
    try:
        with _observed(model) as seen, linears_in_float32(base):
            base(inputs_embeds=embedded[:, :TOKENS], **arguments)
            with _hooks(model, paths, traces, seen):
                base(inputs_embeds=embedded[:, TOKENS:], **arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError, IndexError):
        return {}  # not a decoder that runs on embeddings in float32
    return traces


@contextmanager
def _hooks(
    model: nn.Module, paths: Sequence[str], traces: dict[str, BlockTrace], seen: list[AttentionCall]
) -> Generator[None]:
    """Note what happens in the blocks at `paths`."""
    handles: list[Any] = []
    current: list[BlockTrace] = []

    def enter() -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            current.append(BlockTrace(given.clone() if isinstance(given, Tensor) else torch.empty(0), dict(kwargs)))
            seen.clear()

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            trace = current.pop()
            if isinstance(y, Tensor) and len(args) == 1:
                trace.y, trace.attention = y.clone(), list(seen)
                traces[path] = trace

        return hook

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            y = y[0] if isinstance(y, tuple) and y else y
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point():
                current[-1].calls.append(Call(path, x.clone(), y))

        return hook

    for path in paths:
        block = model.get_submodule(path)
        for name, part in block.named_modules():
            if name:
                handles.append(part.register_forward_hook(note(name), with_kwargs=True))
        handles.append(block.register_forward_pre_hook(enter(), with_kwargs=True))
        handles.append(block.register_forward_hook(leave(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_CALLS: ContextVar[list[AttentionCall] | None] = ContextVar("calls", default=None)


@contextmanager
def _observed(model: PreTrainedModel) -> Generator[list[AttentionCall]]:
    """Attention as the model has it, with every call noted."""
    calls: list[AttentionCall] = []
    config: Any = model.config
    before = config._attn_implementation
    AttentionInterface.register(_OBSERVED, _observe)
    AttentionMaskInterface.register(_OBSERVED, eager_mask)
    token = _CALLS.set(calls)
    try:
        model.set_attn_implementation(_OBSERVED)
        yield calls
    finally:
        model.set_attn_implementation(before)
        _CALLS.reset(token)


def _observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    known = ("dropout", "position_ids", "use_cache", "output_attentions")
    extras = {name: value for name, value in kwargs.items() if name not in known}
    y, weights = attention_interface(module, "eager")(module, q, k, v, mask, **kwargs)
    calls = _CALLS.get()
    if calls is not None:
        calls.append(AttentionCall(module, q, k, v, extras, y))
    return y, weights
