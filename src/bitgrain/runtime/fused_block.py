"""A decoder layer of transformers whose forward is few native calls, as long as it is the simple one.

The layer stays what it is: its modules, hooks, state_dict and class. `models.fused_blocks` finds out what it is made
of, proves it and calls `fuse`; whatever is not the plain case afterwards (gradients, training, hooks inside, a module
or parameter that was replaced, an unknown argument) runs the layer's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitgrain.kernels.decoder import AttentionPart, DecoderBlock, MlpPart
from bitgrain.kernels.int_linear import IntLinear
from bitgrain.kernels.native import DTYPES
from bitgrain.kernels.rows import Act, Rotary, RowNorm
from bitgrain.runtime.fused_stack import FusedStack
from bitgrain.runtime.kv_cache.growing import GrowingLayer
from bitgrain.runtime.packed_kernels import IntKernel
from bitgrain.runtime.quant_linear import QuantLinear

MOST_ROWS = 16
"""New tokens of a batch up to which attention is computed by the block's own native call."""

_PLAIN_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class NormPlan:
    """A norm by its path in the block. offset: the gain is offset + weight."""

    path: str
    weight: str
    bias: str
    eps: float
    centered: bool
    offset: float


@dataclass(frozen=True)
class AttentionPlan:
    """Paths in the block, and what they mean (`kernels.decoder.AttentionPart`).

    module    what is given to the attention interface, with `extras`: what it adds to the layer's own arguments
    plain     whether softmax(scale q k) v is all that attention does, so that the native one may stand for it
    layer     its number in the cache
    """

    norm: NormPlan
    qkv: tuple[str, ...]
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    scale: float
    q_norm: NormPlan | None
    k_norm: NormPlan | None
    module: str
    extras: Mapping[str, Any]
    plain: bool
    layer: int


@dataclass(frozen=True)
class MlpPlan:
    norm: NormPlan
    gate_up: tuple[str, ...]
    down: str
    act: Act
    joined: bool


@dataclass(frozen=True)
class BlockPlan:
    """mlp None: what comes behind attention stays with the modules `rest`, (norm, mlp)."""

    attention: AttentionPlan
    mlp: MlpPlan | None
    rest: tuple[str, str]
    arguments: frozenset[str]
    cache: str


class FusedForward:
    """The forward of one decoder layer; its own one is `original`."""

    def __init__(self, block: nn.Module, plan: BlockPlan) -> None:
        self._block, self.plan = ref(block), plan  # weak: the block owns this
        self.stack: FusedStack | None = None
        self.place = 0
        self._native: DecoderBlock | None = None
        self._guards: _Guards | None = None

    @property
    def block(self) -> nn.Module:
        """The layer whose forward this is."""
        block = self._block()
        assert block is not None
        return block

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["block"], state["plan"])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, stack = self.plan, self.stack
        if stack is not None and self.place and stack.hand_on(self.place, hidden_states):
            return hidden_states
        if args or torch.compiler.is_compiling() or not self._is_plain(hidden_states, kwargs):
            return self.original(hidden_states, *args, **kwargs)
        native = self.native()
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        mask = kwargs.get("attention_mask")
        cache = kwargs.get(plan.cache)
        x = hidden_states if hidden_states.is_contiguous() else hidden_states.contiguous()
        attention = plan.attention
        part = self.block.get_submodule(attention.module) if attention.module else self.block
        implementation = cast(Any, part).config._attn_implementation
        if (
            x.shape[0] * x.shape[1] <= MOST_ROWS
            and cache is not None
            and attention.plain
            and plan.mlp is not None
            and implementation in _PLAIN_ATTENTION
            and isinstance(layer := cache.layers[attention.layer], GrowingLayer)
            and (layer.keys is None or layer.keys.dtype == x.dtype)
            and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.stride(3) == 1))
        ):
            if stack is not None and self.place == 0 and mask is None:
                y = stack.run(x, cos, sin, cache, part.config)
                if y is not None:
                    return y
            new = x.new_empty(x.shape[0], attention.kv_heads, x.shape[1], attention.head_dim)
            keys, values = layer.update(new, new, write=False)
            return native.run(x, cos, sin, keys, values, mask)
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
            k, v = cast(tuple[Tensor, Tensor], cache.update(k, v, plan.layer))
        interface = attention_interface(part, implementation)
        passed = {name: kwargs[name] for name in ("position_ids", "use_cache") if name in kwargs}
        attended, _ = interface(part, q, k, v, mask, dropout=0.0, scaling=plan.scale, **plan.extras, **passed)
        attended = attended.reshape(*x.shape[:2], -1).contiguous()
        y = native.finish(x, attended)
        if self.plan.mlp is None:
            norm, mlp = self.plan.rest
            after = self.block.get_submodule(mlp)(self.block.get_submodule(norm)(y))
            y = y + (after[0] if isinstance(after, tuple) else after)
        return y

    def _is_plain(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        block, guards = self.block, self._guards
        if block.training or x.dtype not in DTYPES or x.device.type != "cpu" or x.numel() == 0:
            return False
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in self.plan.arguments:
                return False
        if guards is None or not guards.hold():
            self._native = None
            guards = self._guards = _Guards(block, self.plan)
        return guards.no_hooks()

    def is_whole(self, x: Tensor) -> bool:
        """Whether nobody would notice if this layer ran in one call with those around it."""
        block = self.block
        plain = self.plan.attention.plain and self.plan.mlp is not None and self._is_plain(x, {})
        return plain and not block._forward_hooks and not block._forward_pre_hooks

    def native(self) -> DecoderBlock:
        """The native block, made when it is first needed and again when a weight was changed."""
        if self._native is None:
            self._native = build(self.block, self.plan)
        return self._native


def fuse(block: nn.Module, plan: BlockPlan) -> None:
    """From now on `block` runs as the plan says wherever it may."""
    cast(Any, block).forward = FusedForward(block, plan)


def stack(blocks: Sequence[nn.Module]) -> None:
    """Let fused layers that follow each other, and are all that their model has, run in one call."""
    FusedStack([cast(FusedForward, block.__dict__["forward"]) for block in blocks])


def unstack(blocks: Sequence[nn.Module]) -> None:
    """Undo `stack`."""
    for block in blocks:
        block.__dict__["forward"].stack = None


def is_fused(block: nn.Module) -> bool:
    """Whether `fuse` was applied."""
    return isinstance(block.__dict__.get("forward"), FusedForward)


def unfuse(module: nn.Module) -> None:
    """Undo `fuse` for everything inside `module`."""
    for part in module.modules():
        if is_fused(part):
            del part.__dict__["forward"]


def build(block: nn.Module, plan: BlockPlan) -> DecoderBlock:
    """The native block of a plan. Raises KernelError where the parts do not fit."""
    attention, mlp = plan.attention, plan.mlp
    return DecoderBlock(
        AttentionPart(
            row_norm(block, attention.norm), _weights(block, attention.qkv), _weights(block, (attention.o,))[0],
            attention.heads, attention.kv_heads, attention.head_dim, attention.rotary, attention.scale,
            attention.q_norm and row_norm(block, attention.q_norm),
            attention.k_norm and row_norm(block, attention.k_norm),
        ),
        mlp and MlpPart(
            row_norm(block, mlp.norm), _weights(block, mlp.gate_up), _weights(block, (mlp.down,))[0], mlp.act,
            mlp.joined,
        ),
    )  # fmt: skip


def row_norm(block: nn.Module, plan: NormPlan) -> RowNorm:
    """The native norm of a plan."""
    norm = block.get_submodule(plan.path)
    weight = norm.get_parameter(plan.weight).float() + plan.offset if plan.weight else None
    bias = norm.get_parameter(plan.bias) if plan.bias else None
    width = next(p for p in norm.parameters()).shape[0]
    return RowNorm(width, weight, bias, eps=plan.eps, centered=plan.centered)


def packed_weight(module: nn.Module) -> IntLinear | None:
    """The packed weight that a layer multiplies by, where it does nothing besides; None for other layers."""
    kernel = module.kernel if type(module) is QuantLinear else None
    whole = isinstance(kernel, IntKernel) and type(kernel.linear) is IntLinear and kernel.call is kernel.linear
    return cast(IntLinear, kernel.linear) if whole else None


def attention_interface(part: nn.Module, implementation: str) -> Callable[..., Any]:
    """transformers' function for an attention module; its own file holds the one called eager."""
    own = getattr(sys.modules[type(part).__module__], "eager_attention_forward", None)
    return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own))


def _weights(block: nn.Module, paths: tuple[str, ...]) -> tuple[IntLinear, ...]:
    return tuple(cast(IntLinear, packed_weight(block.get_submodule(path))) for path in paths)


class _Guards:
    """What must not change: the modules of a block, the hooks on them, the parameters of its norms."""

    def __init__(self, block: nn.Module, plan: BlockPlan) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._own: list[dict[str, Any]] = []
        for parent in block.modules():
            children = cast(dict[str, Any], parent._modules)
            for name, child in children.items():
                if child is not None:
                    self._places.append((children, name))
                    self._hooks += [child._forward_hooks, child._forward_pre_hooks]
                    self._own.append(child.__dict__)
                    if isinstance(child, QuantLinear):
                        self._places.append((child.__dict__, "kernel"))
        self._parameters: list[Tensor] = []
        norms = (plan.attention.norm, plan.attention.q_norm, plan.attention.k_norm, plan.mlp and plan.mlp.norm)
        for norm in norms:
            if norm is not None:
                owned = cast(dict[str, Any], block.get_submodule(norm.path)._parameters)
                for name in filter(None, (norm.weight, norm.bias)):
                    self._places.append((owned, name))
                    self._parameters.append(owned[name])
        self._found = self._look()

    def _look(self) -> tuple[list[Any], list[int], list[int]]:
        parameters = self._parameters
        return (
            [id(own[name]) if name in own else 0 for own, name in self._places],
            [one._version for one in parameters],
            [one.data_ptr() for one in parameters],
        )

    def hold(self) -> bool:
        """Whether modules, kernels and parameters are those that were there."""
        return self._look() == self._found

    def no_hooks(self) -> bool:
        """Whether nobody looks into the block, and no module's forward is another one than its class has."""
        return not any(self._hooks) and not any(["forward" in own for own in self._own])
