"""Which models run their layers in one native call, and one new token past their own code: watched, then proved."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitgrain.errors import KernelError
from bitgrain.kernels.rows import ModuleNorm
from bitgrain.models.block_trace import TOKENS, embedded_tokens, some_tokens
from bitgrain.runtime.fused_block import stack
from bitgrain.runtime.fused_model import FusedModel, ModelPlan, Output
from bitgrain.runtime.kv_cache import past_argument
from bitgrain.runtime.kv_cache.growing import GrowingCache

_STEPS = 3
"""Of one token, by which a plan is proved."""

Called = tuple[tuple[Any, ...], dict[str, Any], Any]


def fuse_model(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """`stack` fused layers, all that the model has, if it then gives the same bits: it does nothing between them. The
    same for what it does around them."""
    base = model.base_model
    if "forward" in base.__dict__:
        return
    before = _run_embedded(model)
    made = stack(blocks)
    base.forward = FusedModel(base, made)
    if not _run_embedded(model).equal(before):
        made.remove()
        del base.forward
        return
    plan = _plan(model, blocks)
    if plan is not None and _proved(model, fused := FusedModel(base, made, plan)):
        base.forward = fused


@torch.no_grad()
def _run_embedded(model: PreTrainedModel) -> Tensor:
    """The last hidden states of a few tokens, the last of them behind the others."""
    embedded = embedded_tokens(model)
    base = model.base_model
    arguments: dict[str, Any] = {past_argument(base): GrowingCache(model.config), "use_cache": True}
    first = base(inputs_embeds=embedded[:, :TOKENS], **arguments)
    last = base(inputs_embeds=embedded[:, TOKENS:], **arguments)
    return torch.cat([first.last_hidden_state, last.last_hidden_state], 1)


@torch.no_grad()
def _plan(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> ModelPlan | None:
    """What the model does around its layers for one token; None where it is more than steps know."""
    base, ids = model.base_model, some_tokens(model)
    past = past_argument(base)
    if "input_ids" not in inspect.signature(base.forward).parameters:
        return None
    layers = next((name for name, one in base.named_children() if list(one.children()) == list(blocks)), None)
    if layers is None:
        return None
    cache = GrowingCache(model.config)
    arguments: dict[str, Any] = {past: cache, "use_cache": True}
    base(input_ids=ids[:, :TOKENS], **arguments)
    around = {name: one for name, one in base.named_children() if name != layers}
    inner = dict(enumerate(blocks))
    last = ids[:, TOKENS:]
    output, calls = _watched(base, {**around, **inner}, {"input_ids": last, **arguments})
    through = [calls.pop(place) for place in inner if place in calls]
    kind = Output.like(output, past)
    if len(through) != len(blocks) or kind is None or output[past] is not cache:
        return None
    x = [args[0] for args, _, _ in through] + [through[-1][2]]
    embedding = _name(calls, (last,), x[0])
    norm = _name(calls, (x[-1],), output["last_hidden_state"])
    turned = through[0][1].get("position_embeddings")
    rotary = "" if turned is None else next((str(name) for name, one in calls.items() if one[2] is turned), None)
    if embedding is None or norm is None or rotary is None or len(calls) != 2 + bool(rotary):
        return None
    if rotary and len(calls[rotary][0]) + len(calls[rotary][1]) != 2:
        return None
    for place, (args, given, y) in enumerate(through):
        if len(args) != 1 or y is not x[place + 1] or given.get("attention_mask") is not None:
            return None
        if given.get("position_embeddings") is not turned:
            return None
    return ModelPlan(embedding, rotary, layers, norm, past, kind, _gain(base.get_submodule(norm), x[-1]))


def _gain(norm: nn.Module, x: Tensor) -> tuple[str, str] | None:
    """The parameter and the attribute, eps, with which `ModuleNorm` gives the norm's bits for inputs like x."""
    rows = torch.randn(64, *x.shape, generator=torch.Generator().manual_seed(0))
    rows = (rows * torch.logspace(-2, 2, len(rows)).view(-1, *(1,) * x.ndim)).to(x.dtype)
    parameters = dict(norm.named_parameters())
    if len(parameters) != 1 or x.numel() != x.shape[-1]:
        return None
    name, weight = next(iter(parameters.items()))
    for attribute, eps in vars(norm).items():
        if not isinstance(eps, float) or not 0 < eps < 1e-2:
            continue
        try:
            own = ModuleNorm(weight, eps)
            if all(own(row).equal(norm(row)) for row in (*rows, x)):
                return name, attribute
        except KernelError:
            return None
    return None


def _watched(
    base: nn.Module, modules: dict[Any, nn.Module], arguments: dict[str, Any]
) -> tuple[Any, dict[Any, Called]]:
    """The output, and what each module that was called once was given and gave."""
    calls: dict[Any, Called] = {}

    def noting(name: Any) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            calls[name] = args, kwargs, y

        return hook

    hooks = [one.register_forward_hook(noting(name), with_kwargs=True) for name, one in modules.items()]
    try:
        return base(**arguments), calls
    finally:
        for hook in hooks:
            hook.remove()


def _name(calls: dict[Any, Called], given: tuple[Any, ...], y: Any) -> str | None:
    """The module that was given this alone, and gave this."""
    for name, (args, kwargs, result) in calls.items():
        if result is y and not kwargs and len(args) == len(given) and all(map(lambda a, b: a is b, args, given)):
            return str(name)
    return None


@torch.no_grad()
def _proved(model: PreTrainedModel, fused: FusedModel) -> bool:
    """Whether steps give the same bits as the model's own forward."""
    ids, plan = some_tokens(model), cast(ModelPlan, fused.plan)
    results: list[list[Tensor]] = []
    for run in (fused.original, lambda **given: fused.step(plan, given)):
        cache = GrowingCache(model.config)
        arguments: dict[str, Any] = {plan.cache: cache, "use_cache": True}
        fused.original(input_ids=ids[:, :TOKENS], **arguments)
        found: list[Tensor] = []
        for step in range(_STEPS):
            output = run(input_ids=ids[:, step : step + 1], **arguments)
            if output is None or type(output) is not plan.output.kind or output[plan.cache] is not cache:
                return False
            found.append(output["last_hidden_state"])
        results.append(found)
    return all(a.equal(b) for a, b in zip(*results, strict=True))
