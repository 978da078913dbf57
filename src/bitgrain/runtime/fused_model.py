"""The forward of a model whose decoder layers run in one native call: one new token goes past transformers' own code.

What that code does for one token behind a cache is little: rows of the embedding, a position, no mask, the layers, the
last norm. `models.fused_steps` finds out that it is no more and proves it by running both; whatever else is asked for
(a mask that hides something, embeddings in place of tokens, hidden states, gradients, hooks) goes the model's own way.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitgrain.kernels.decoder import address_positions
from bitgrain.kernels.rows import ModuleNorm
from bitgrain.runtime.fused_block import MOST_ROWS, FusedForward
from bitgrain.runtime.fused_stack import FusedStack
from bitgrain.runtime.guards import Guards
from bitgrain.runtime.kv_cache.growing import GrowingLayer
from bitgrain.runtime.kv_cache.layers import QuantizedLayer
from bitgrain.runtime.owned import OwnedBy
from bitgrain.runtime.positions import Positions

_SETTINGS = (
    "_attn_implementation_internal",
    "num_hidden_layers",
    "output_attentions",
    "_output_attentions",
    "output_hidden_states",
    "return_dict",
    "is_causal",
    "sliding_window",
    "attention_chunk_size",
    "layer_types",
)
"""What transformers asks a config about while it makes one token."""


_NOWHERE = address_positions(None, None)


@dataclass(frozen=True)
class Output:
    """A ModelOutput of this class that has nothing but the last hidden state and the past, under this name."""

    kind: type[Any]
    cache: str
    attributes: Mapping[str, Any]
    """Its other ones."""

    @classmethod
    def like(cls, output: Any, cache: str) -> Output | None:
        """None where it has more, or would not be what a new one is."""
        attributes = {name: value for name, value in vars(output).items() if name not in ("last_hidden_state", cache)}
        if set(output) != {"last_hidden_state", cache} or any(value is not None for value in attributes.values()):
            return None
        made = cls(type(output), cache, attributes)
        again = made.made(output["last_hidden_state"], output[cache])
        same = list(again.items()) == list(output.items()) and vars(again) == vars(output)
        return made if same else None

    def made(self, state: Tensor, cache: Any) -> Any:
        """A new one, without its checks of fields."""
        output: Any = OrderedDict.__new__(self.kind)
        for name, value in (("last_hidden_state", state), (self.cache, cache)):
            OrderedDict.__setitem__(output, name, value)
        vars(output).update(self.attributes, last_hidden_state=state, **{self.cache: cache})
        return output


@dataclass(frozen=True)
class ModelPlan:
    """Paths in the model, and what its forward takes and gives.

    rotary  gives what layers are passed as position_embeddings; "" where they are passed none
    cache   name of the past among the arguments and in the output
    gain    parameter and attribute, eps, of the norm, where `ModuleNorm` gives its bits with them; or None
    """

    embedding: str
    rotary: str
    layers: str
    norm: str
    cache: str
    output: Output
    gain: tuple[str, str] | None


@dataclass(frozen=True)
class _Parts:
    """What steps are made of, as long as the guards hold: the embedding's rows, of this dtype, and the last norm."""

    guards: Guards
    embedding: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    positions: Positions | None
    layers: int
    norm: Callable[[Tensor], Tensor]


class FusedModel(OwnedBy):
    """In place of the forward of a model that calls the layers of `stack`; plan None: it always runs its own."""

    def __init__(self, model: nn.Module, stack: FusedStack | None, plan: ModelPlan | None = None) -> None:
        super().__init__(model)
        self.stack, self.plan = stack, plan
        self._own = type(model).forward
        own = inspect.signature(self._own)
        self.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])
        self._known = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"}
        self._known |= {plan.cache} if plan else set()
        self._parts: _Parts | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"], None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plan is not None and not args and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = self.step(self.plan, kwargs)
            if found is not None:
                return found
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        owner, stack = self.owner, self.stack
        if stack is None or torch.compiler.is_compiling():
            return type(owner).forward(owner, *args, **kwargs)
        stack.enter()
        try:
            return type(owner).forward(owner, *args, **kwargs)
        finally:
            stack.leave()

    def step(self, plan: ModelPlan, kwargs: dict[str, Any]) -> Any:
        """The output for one new token of each sequence; None where the model has to find it by itself."""
        owner, stack, ids, cache = self.owner, self.stack, kwargs.get("input_ids"), kwargs.get(plan.cache)
        if stack is None or type(ids) is not Tensor or cache is None or owner.training:
            return None
        if kwargs.get("use_cache") is not True or kwargs.get("return_dict") is False:
            return None
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in self._known:
                return None
        if ids.ndim != 2 or ids.shape[1] != 1 or not 0 < len(ids) <= MOST_ROWS or ids.device.type != "cpu":
            return None
        layers = getattr(cache, "layers", None)
        if not layers or type(layers[0]) not in (GrowingLayer, QuantizedLayer):
            return None
        past = layers[0].get_seq_length()
        if not past or not _sees_all(kwargs.get("attention_mask"), (len(ids), past + 1)):
            return None
        parts = self._parts
        if parts is None or not parts.guards.hold():
            parts = self._parts = self._look(plan, stack, ids)
        if parts is None or not parts.guards.no_hooks() or type(owner).forward is not self._own:
            return None
        x = parts.embedding(ids)
        if len(layers) != parts.layers or x.dtype != parts.dtype:
            return None
        turned = (), _NOWHERE
        if parts.positions is not None:
            turned = parts.positions.of(x, kwargs.get("position_ids"), past)
            if turned is None:
                return None
        y = stack.compute(x, turned[1], layers)
        return None if y is None else plan.output.made(parts.norm(y), cache)

    def _look(self, plan: ModelPlan, stack: FusedStack, ids: Tensor) -> _Parts | None:
        """None where there can be no steps."""
        owner, forwards = self.owner, stack.forwards()
        config = cast(Any, owner).config
        container = owner.get_submodule(plan.layers)
        found = [block.__dict__.get("forward") for block in container.children()]
        if found != forwards or not _is_plain(config) or config.num_hidden_layers != len(found):
            return None
        attentions = [one.plan.attention for one in forwards]
        if [one.layer for one in attentions] != list(range(len(found))) or any(
            value is not None for one in attentions for value in one.extras.values()
        ):
            return None
        embedding, norm = owner.get_submodule(plan.embedding), owner.get_submodule(plan.norm)
        embedded = embedding(ids)
        if any(one.attended.config is not config for one in forwards) or not stack.is_whole(embedded):
            return None
        guards = Guards()
        for path in (plan.embedding, plan.norm, plan.layers, *((plan.rotary,) if plan.rotary else ())):
            parent, _, name = path.rpartition(".")
            guards.watch_child(owner.get_submodule(parent), name)
        for name, block in container.named_children():
            guards.watch_value(container._modules, name)
            guards.watch_value(block.__dict__, "forward")
            guards.watch_value(block.__dict__, "training")
            guards.watch_hooks(block)
        for one in forwards:
            assert one.guards is not None
            guards.join(one.guards)
        for name in _SETTINGS:
            guards.watch_value(vars(config), config.attribute_map.get(name, name))
        positions = None
        if plan.rotary:
            rotary = owner.get_submodule(plan.rotary)
            positions = Positions(rotary, attentions[0])
            guards.watch_tensors(rotary._buffers, rotary._buffers)
            guards.watch_settings(rotary)
        embed, normed = partial(type(embedding).forward, embedding), partial(type(norm).forward, norm)
        if type(embedding) is nn.Embedding and embedding.max_norm is None and type(embedding.weight) is nn.Parameter:
            embed = partial(_rows, embedding)
            guards.watch_value(embedding._parameters, "weight")
        if plan.gain is not None and norm.get_parameter(plan.gain[0]).dtype == embedded.dtype:
            normed = ModuleNorm(norm.get_parameter(plan.gain[0]), vars(norm)[plan.gain[1]])
            guards.watch_tensors(norm._parameters, [plan.gain[0]])
            guards.watch_settings(norm)
        guards.look()
        return _Parts(guards, embed, embedded.dtype, positions, len(found), normed)


def _rows(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """What a plain embedding gives for ids [batch, 1]; of one sequence a view of the row, which nobody changes."""
    weight = embedding._parameters["weight"]
    assert weight is not None
    if len(ids) == 1 and weight.is_contiguous() and 0 <= (row := int(ids)) < len(weight):
        return weight.narrow(0, row, 1).unsqueeze(0)
    return embedding.forward(ids)


def unfuse(module: nn.Module) -> None:
    """Undo `fuse` for everything inside `module`."""
    for part in module.modules():
        if isinstance(part.__dict__.get("forward"), FusedForward | FusedModel):
            del part.__dict__["forward"]


def _sees_all(mask: Any, shape: tuple[int, int]) -> bool:
    """Whether a mask hides nothing."""
    return mask is None or (isinstance(mask, Tensor) and mask.shape == shape and bool(mask.all()))


def _is_plain(config: Any) -> bool:
    """Whether transformers makes no mask for one token, and gives what it is asked for and no more."""
    return (
        config._attn_implementation == "sdpa"
        and getattr(config, "is_causal", True) is True
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "attention_chunk_size", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and config.return_dict is not False
        and not config.output_attentions
        and not config.output_hidden_states
    )
