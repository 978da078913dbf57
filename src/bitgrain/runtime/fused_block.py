"""A decoder layer of transformers whose forward is few native calls, as long as it is the simple one.

The layer stays what it is: its modules, hooks, state_dict and class. `models.fused_blocks` finds out what it is made
of, proves it and calls `fuse`; whatever is not the plain case afterwards (gradients, training, hooks inside, a module
or parameter that was replaced, an unknown argument) runs the layer's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitgrain.errors import KernelError
from bitgrain.kernels import prefill_attention
from bitgrain.kernels.code_linear import CodeLinear
from bitgrain.kernels.decoder import AttentionPart, DecoderBlock, MlpPart, Weight
from bitgrain.kernels.dense_rows import DenseLinear
from bitgrain.kernels.int_linear import IntLinear
from bitgrain.kernels.native import DTYPES
from bitgrain.kernels.rows import RowNorm
from bitgrain.runtime.block_caches import kind_of, with_room
from bitgrain.runtime.block_plan import AttentionPlan, BlockPlan, NormPlan
from bitgrain.runtime.fused_stack import FusedStack
from bitgrain.runtime.guards import Guards
from bitgrain.runtime.owned import OwnedBy
from bitgrain.runtime.quant_linear import QuantLinear

MOST_ROWS = 16
"""New tokens of a batch up to which attention is computed by the block's own native call."""

_PLAIN_ATTENTION = ("sdpa", "eager")


class FusedForward(OwnedBy):
    """The forward of one decoder layer; its own one is `original`."""

    def __init__(self, block: nn.Module, plan: BlockPlan) -> None:
        super().__init__(block)
        self.plan = plan
        self.stack: FusedStack | None = None
        self.place = 0
        self._native: DecoderBlock | None = None
        self.guards: Guards | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"], state["plan"])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.owner).forward(self.owner, *args, **kwargs)

    @property
    def attended(self) -> Any:
        """The module of attention: it has a config."""
        attention = self.plan.attention
        return self.owner.get_submodule(attention.module) if attention.module else self.owner

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, stack = self.plan, self.stack
        if stack is not None and self.place and stack.hand_on(self.place, hidden_states):
            return hidden_states
        if args or torch.compiler.is_compiling() or not self._is_plain(hidden_states, kwargs):
            return self.original(hidden_states, *args, **kwargs)
        native = self._native
        assert native is not None
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        if not fit(hidden_states, cos, sin, plan.attention):
            return self.original(hidden_states, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        cache = kwargs.get(plan.cache)
        x = hidden_states if hidden_states.is_contiguous() else hidden_states.contiguous()
        attention = plan.attention
        part = self.attended
        implementation = part.config._attn_implementation
        if (
            x.shape[0] * x.shape[1] <= MOST_ROWS
            and cache is not None
            and attention.plain
            and plan.mlp is not None
            and implementation in _PLAIN_ATTENTION
            and kind_of(layer := cache.layers[attention.layer], x, native.attention) is not None
            and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.stride(3) == 1))
        ):
            if stack is not None and self.place == 0 and mask is None:
                y = stack.run(x, cos, sin, cache, part.config)
                if y is not None:
                    return y
            y = native.run(x, cos, sin, with_room(layer, x, native.attention), mask)
            if y is not None:
                return y
        return self._by_interface(native, part, implementation, x, cos, sin, mask, cache, kwargs)

    def _by_interface(
        self,
        native: DecoderBlock,
        part: nn.Module,
        implementation: str,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Attention by what the model is set to, with any mask and any cache."""
        plan = self.plan.attention
        q, k, v = native.start(x, cos, sin).split(
            [plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim, plan.kv_heads * plan.head_dim], -1
        )
        q, k, v = (one.unflatten(-1, (-1, plan.head_dim)).transpose(1, 2) for one in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, plan.layer)
        if (
            plan.plain
            and implementation in _PLAIN_ATTENTION
            and mask is None
            and k.shape[2] == q.shape[2] > 1
            and prefill_attention.serves(q, k, v)
        ):
            attended = prefill_attention.prefill_attention(q, k, v, scaling=plan.scale).flatten(2)
            return self._finish(native, x, attended)
        interface = attention_interface(part, implementation)
        passed = {name: kwargs[name] for name in ("position_ids", "use_cache") if name in kwargs}
        attended, _ = interface(part, q, k, v, mask, dropout=0.0, scaling=plan.scale, **plan.extras, **passed)
        return self._finish(native, x, attended.reshape(*x.shape[:2], -1).contiguous())

    def _finish(self, native: DecoderBlock, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention."""
        y = native.finish(x, attended)
        if self.plan.mlp is None:
            norm, mlp = self.plan.rest
            after = self.owner.get_submodule(mlp)(self.owner.get_submodule(norm)(y))
            y = y + (after[0] if isinstance(after, tuple) else after)
        return y

    def _is_plain(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        block, guards = self.owner, self.guards
        if block.training or x.dtype not in DTYPES or x.device.type != "cpu" or x.numel() == 0:
            return False
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in self.plan.arguments:
                return False
        if guards is None or not guards.hold():
            self._native = build(block, self.plan)
            guards = self.guards = Guards.of_block(block, {**self.plan.norms(), **_dense_parameters(block, self.plan)})
        if torch.is_grad_enabled() and guards.need_gradients():
            return False
        return self._native is not None and guards.no_hooks()

    def whole(self, x: Tensor) -> DecoderBlock | None:
        """The native block, if nobody would notice that this layer ran in one call with those around it."""
        plain = self.plan.attention.plain and self.plan.mlp is not None and self._is_plain(x, {})
        watched = self.guards is None or self.guards.looked_at(self.owner)
        return self._native if plain and not watched else None


def fuse(block: nn.Module, plan: BlockPlan) -> None:
    """From now on `block` runs as the plan says wherever it may."""
    cast(Any, block).forward = FusedForward(block, plan)


def stack(blocks: Sequence[nn.Module]) -> FusedStack:
    """Let fused layers that follow each other, and are all that a model runs, run in one call."""
    return FusedStack([cast(FusedForward, block.__dict__["forward"]) for block in blocks])


def is_fused(block: nn.Module) -> bool:
    """Whether `fuse` was applied."""
    return isinstance(block.__dict__.get("forward"), FusedForward)


def build(block: nn.Module, plan: BlockPlan) -> DecoderBlock | None:
    """The native block of a plan; None where its layers have no native products or do not fit."""
    attention, mlp = plan.attention, plan.mlp
    weights: dict[str, Weight] = {}
    for path in plan.linears():
        found = native_weight(block.get_submodule(path))
        if found is None:
            return None
        weights[path] = found
    part = AttentionPart(
        row_norm(block, attention.norm), tuple(weights[path] for path in attention.qkv), weights[attention.o],
        attention.heads, attention.kv_heads, attention.head_dim, attention.rotary, attention.scale,
        attention.q_norm and row_norm(block, attention.q_norm), attention.k_norm and row_norm(block, attention.k_norm),
    )  # fmt: skip
    behind = mlp and MlpPart(
        row_norm(block, mlp.norm), tuple(weights[path] for path in mlp.gate_up), weights[mlp.down], mlp.act, mlp.joined
    )
    try:
        return DecoderBlock(part, behind)
    except KernelError:
        return None


def row_norm(block: nn.Module, plan: NormPlan) -> RowNorm:
    """The native norm of a plan."""
    norm = block.get_submodule(plan.path)
    weight = norm.get_parameter(plan.weight).float() + plan.offset if plan.weight else None
    bias = norm.get_parameter(plan.bias) if plan.bias else None
    width = next(p for p in norm.parameters()).shape[0]
    return RowNorm(width, weight, bias, eps=plan.eps, centered=plan.centered)


def native_weight(module: nn.Module) -> Weight | None:
    """The weight that a layer multiplies by, packed or dense, where it does nothing besides; None for other layers."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return packed_weight(module)
    try:
        return DenseLinear(module.weight, module.bias) if type(cast(Any, module).weight) is nn.Parameter else None
    except KernelError:
        return None


def _dense_parameters(block: nn.Module, plan: BlockPlan) -> dict[str, list[str]]:
    """Path of each layer that is not packed -> its parameters."""
    found: dict[str, list[str]] = {}
    for path in plan.linears():
        layer = block.get_submodule(path)
        if type(layer) is nn.Linear:
            found[path] = [name for name, _ in layer.named_parameters()]
    return found


def packed_weight(module: nn.Module) -> IntLinear | CodeLinear | None:
    """The packed weight that a layer multiplies by, where it does nothing besides; None for other layers."""
    kernel = module.kernel if type(module) is QuantLinear else None
    if kernel is not None and isinstance(kernel.linear, IntLinear | CodeLinear) and kernel.call is kernel.linear:
        return kernel.linear
    return None


def attention_interface(part: nn.Module, implementation: str) -> Callable[..., Any]:
    """transformers' function for an attention module; its own file holds the one called eager."""
    own: Any = getattr(sys.modules[type(part).__module__], "eager_attention_forward", None)
    return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own))


def fit(x: Tensor, cos: Tensor | None, sin: Tensor | None, plan: AttentionPlan) -> bool:
    """Whether there is a position for each token, as the kernels read them."""
    if cos is None or sin is None:
        return plan.rotary == "none"
    return (
        plan.rotary != "none"
        and cos.ndim == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[1]
        and cos.shape[2] <= plan.head_dim
        and cos.dtype == sin.dtype
        and cos.dtype in DTYPES
        and cos.is_contiguous()
        and sin.is_contiguous()
    )
