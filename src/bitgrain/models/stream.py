"""A model that runs one block at a time: what calibration needs, with memory for one block whatever the model's size.

The model's own forward is used for everything outside the blocks. While it runs, every block only notes the arguments
that it is called with (masks, positions, ...) and hands its input on; the blocks themselves are run afterwards, one
after the other, with those arguments.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitgrain.errors import ModelError
from bitgrain.models.anatomy import Anatomy
from bitgrain.models.naming import convert_tensors

Read = Callable[[str], Tensor]
"""Gives the tensor of a name on disk."""


@dataclass
class Call:
    """The arguments of a block other than the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: str | None = None
    """The keyword under which the hidden states were passed; None: first in place."""


@dataclass
class Captured:
    """One batch on its way into the blocks: the hidden states [batch, tokens, hidden] and, by block, its call."""

    hidden: Tensor
    calls: dict[int, Call] = field(default_factory=dict)


class _Stop(Exception):
    """The last block has been reached; what comes after it is not wanted."""


class StreamedModel:
    """`skeleton` (on the meta device, from `build_skeleton`) with its weights read when they are needed.

    read    gives a tensor by its name on disk; dtype: in which everything is computed
    Raises ModelError for a model whose blocks cannot be run one by one.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        anatomy: Anatomy,
        read: Read,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not anatomy.block_names:
            raise ModelError(f"{anatomy.architecture} has no repeated blocks: it cannot be calibrated block by block")
        self.model = skeleton
        self.anatomy = anatomy
        self.device = torch.device(device)
        self.dtype = dtype
        self.read = read
        self._names: dict[int | None, list[str]] = {}
        for name in (*(weight.tensor for weight in anatomy.weights), *anatomy.others):
            self._names.setdefault(anatomy.block_of[name], []).append(name)
        self._returns_tuple: dict[type[nn.Module], int] = {}
        _fill_buffers(cast(PreTrainedModel, skeleton), self.device)
        self.load(self._names.get(None, []))
        self.tie()

    def names(self, index: int | None) -> list[str]:
        """Names on disk of the tensors of a block; None: of all outside the blocks."""
        return self._names.get(index, [])

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.block_names[index])

    def load(self, names: Iterable[str]) -> None:
        """Read these tensors and put them into the model. Tensors that are joined in memory must come together."""
        self.put({name: self.read(name) for name in names})

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers from tensors under their names on disk."""
        for name, tensor in convert_tensors(self.model, tensors).items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None).contiguous()
            tensor = tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
            is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def load_block(self, index: int) -> nn.Module:
        """The block with its weights; `free_block` lets go of them."""
        self.load(self.names(index))
        return self.block(index)

    def free_block(self, index: int) -> None:
        for module in self.block(index).modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def capture(self, ids: Tensor) -> Captured:
        """What the blocks are given for token ids [batch, tokens]. Raises ModelError where several stacks follow
        each other, as in an encoder-decoder."""
        captured: list[Captured] = []
        last = len(self.anatomy.block_names) - 1

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            if not captured:
                captured.append(Captured(hidden.detach()))
            elif hidden.data_ptr() != captured[0].hidden.data_ptr():
                raise ModelError(
                    f"{self.anatomy.block_names[index]} is not given the output of the block before it: a model of "
                    "several stacks cannot be calibrated block by block; use a solver that needs no calibration"
                )
            captured[0].calls[index] = call
            if index == last:
                raise _Stop
            return hidden

        self._run(ids, note)
        if not captured:
            raise ModelError(f"{self.anatomy.architecture} runs none of its blocks on text, so it cannot be calibrated")
        return captured[0]

    def tail(self, ids: Tensor, hidden: Tensor, grad: bool = False) -> Any:
        """What the model makes of `hidden`, the output of its last block: its output object; `grad`: differentiable."""
        reached = max(self.reached)

        def replace(index: int, given: Tensor, call: Call) -> Tensor:
            return hidden if index == reached else given

        return self._run(ids, replace, grad)

    def run(self, index: int, hidden: Tensor, call: Call, block: nn.Module | None = None) -> Tensor:
        """The output of block `index` (or of `block` in its place) [batch, tokens, hidden]."""
        module = self.block(index) if block is None else block
        return _tensor_of(call_block(module, hidden, call))

    def _run(self, ids: Tensor, listen: Callable[[int, Tensor, Call], Tensor], grad: bool = False) -> Any:
        self.reached: set[int] = getattr(self, "reached", set())
        names = self.anatomy.block_names

        def passing(index: int) -> Callable[..., Any]:
            module = self.block(index)
            parameters = list(inspect.signature(module.forward).parameters)

            def forward(*args: Any, **kwargs: Any) -> Any:
                self.reached.add(index)
                by_name = None if args else parameters[0]
                hidden = args[0] if args else kwargs.pop(parameters[0])
                call = Call(args[1:], kwargs, by_name)
                width = self._width(index, hidden, call)
                result = listen(index, hidden, call)
                return result if width == 0 else (result, *[None] * (width - 1))

            return forward

        blocks = [self.block(index) for index in range(len(names))]
        for index, block in enumerate(blocks):
            block.forward = passing(index)  # type: ignore[method-assign]
        try:
            with torch.set_grad_enabled(grad):
                return self.model(input_ids=ids.to(self.device), **_without_cache(self.model))
        except _Stop:
            return None
        finally:
            for block in blocks:
                del block.forward

    def _width(self, index: int, hidden: Tensor, call: Call) -> int:
        """0 if blocks of this class return a tensor, else the length of the tuple: known from running one."""
        block = self.block(index)
        kind = type(block)
        if kind not in self._returns_tuple:
            forward = block.forward
            del block.forward
            try:
                self.load_block(index)
                output = call_block(block, hidden, call)
            finally:
                block.forward = forward  # type: ignore[method-assign]
                self.free_block(index)
            self._returns_tuple[kind] = len(output) if isinstance(output, tuple) else 0
        return self._returns_tuple[kind]

    def tie(self) -> None:
        """Parameters that share a tensor on disk become one again, after `put` of one of them."""
        for group in self.anatomy.tied:
            filled = [one for name in group if not (one := self.model.get_parameter(name)).is_meta]
            for name in group if filled else ():
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, filled[0])


def call_block(block: nn.Module, hidden: Tensor, call: Call) -> Any:
    """Run a block as the model does."""
    if call.by_name is not None:
        return block(*call.args, **{call.by_name: hidden}, **call.kwargs)
    return block(hidden, *call.args, **call.kwargs)


def share_calls(batches: Sequence[Captured]) -> None:
    """Let equal masks and positions of all batches and blocks be one tensor each."""
    known: list[Tensor] = []

    def shared(value: Any) -> Any:
        if isinstance(value, Tensor):
            for one in known:
                if one is value or (one.shape == value.shape and one.dtype == value.dtype and torch.equal(one, value)):
                    return one
            known.append(value)
            return value
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(shared(one) for one in value)
        if type(value) is list:
            return [shared(one) for one in value]
        if type(value) is dict:
            return {key: shared(one) for key, one in value.items()}
        return value

    for batch in batches:
        for call in batch.calls.values():
            call.args, call.kwargs = shared(call.args), shared(call.kwargs)


def twin(block: nn.Module) -> nn.Module:
    """A copy of a block with weights of its own."""
    return copy.deepcopy(block)


def _tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _without_cache(model: nn.Module) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "return_dict": True}
    return {key: value for key, value in wanted.items() if key in known}


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) get their values as transformers gives them."""
    for module in model.modules():
        missing = [(leaf, buffer) for leaf, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for leaf, buffer in missing:
            setattr(module, leaf, torch.empty_like(buffer, device=device))
        if missing:
            model._init_weights(module)  # pyright: ignore[reportPrivateUsage]
