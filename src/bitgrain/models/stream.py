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
from bitgrain.runtime.kv_cache import past_argument

_NOT_BY_BLOCK = "cannot be calibrated block by block; use a solver that needs no calibration"
_PROBE = 8
"""Tokens with which a model is tried."""

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
    Known after the first `capture`: `reached`, the blocks that text runs through; `predicts_tokens`.
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
        stacks = {name.rpartition(".")[0] for name in anatomy.block_names}
        if len(stacks) > 1 and getattr(skeleton.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{anatomy.architecture} is an encoder and a decoder: a model of several stacks {_NOT_BY_BLOCK}"
            )
        self.model = skeleton
        self.anatomy = anatomy
        self.device = torch.device(device)
        self.dtype = dtype
        self.read = read
        self._names: dict[int | None, list[str]] = {}
        for name in (*(weight.tensor for weight in anatomy.weights), *anatomy.others):
            self._names.setdefault(anatomy.block_of[name], []).append(name)
        self.reached: set[int] = set()
        self.predicts_tokens = False
        self._extras: dict[type[nn.Module], tuple[Any, ...] | None] = {}
        _fill_buffers(cast(PreTrainedModel, skeleton), self.device)
        self._tied = {name: [one for one in group if one != name] for group in anatomy.tied for name in group}
        self.load(self._names.get(None, []))

    def names(self, index: int | None) -> list[str]:
        """Names on disk of the tensors of a block; None: of all outside the blocks."""
        return self._names.get(index, [])

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.block_names[index])

    def load(self, names: Iterable[str]) -> None:
        """Read these tensors and put them into the model. Tensors that are joined in memory must come together."""
        self.put({name: self.read(name) for name in names})

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill parameters and buffers from tensors under their names on disk; what is tied to them stays so."""
        here = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        for name, tensor in convert_tensors(self.model, here).items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            tensor = tensor.to(self.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            # aligned, for the same bits however it was read; alone in its memory, for `Watch` tells weights by it
            if tensor.data_ptr() % 64 or tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
            put = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(module, leaf, put)
            for other in self._tied.get(name, ()):
                owner, _, leaf = other.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, put)

    def load_block(self, index: int) -> nn.Module:
        """The block with its weights; `free_block` lets go of them."""
        self.load(self.names(index))
        return self.block(index)

    def free_block(self, index: int) -> None:
        for module in self.block(index).modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def capture(self, ids: Tensor, cache: Any = None) -> Captured:
        """What the blocks are given for token ids [batch, tokens]; `cache`: a cache of transformers that they get too.

        Raises ModelError where several stacks follow each other, a block is run twice, or blocks hand each other more
        than hidden states.
        """
        if not self.reached:
            self._probe(ids[:1, :_PROBE])
        captured: list[Captured] = []
        last = max(self.reached)

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            if not captured:
                captured.append(Captured(hidden.detach()))
            elif hidden.data_ptr() != captured[0].hidden.data_ptr():
                raise ModelError(
                    f"{self.anatomy.block_names[index]} is not given the output of the block before it: a model of "
                    f"several stacks {_NOT_BY_BLOCK}"
                )
            captured[0].calls[index] = call
            if index == last:
                raise _Stop
            return hidden

        self._run(ids, note, cache=cache)
        return captured[0]

    def _probe(self, ids: Tensor) -> None:
        """Learn from a few tokens which blocks text reaches, and whether they can be run one by one."""
        names, reached = self.anatomy.block_names, set[int]()

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index in reached:
                raise ModelError(f"{names[index]} is run more than once: a model that shares blocks {_NOT_BY_BLOCK}")
            given = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
            if any(value is extra for extras in self._extras.values() for extra in extras or () for value in given):
                raise ModelError(
                    f"{names[index]} is given more than hidden states by the block before it: such a model "
                    f"{_NOT_BY_BLOCK}"
                )
            reached.add(index)
            return hidden

        output = self._run(ids, note)
        self.predicts_tokens = getattr(output, "logits", None) is not None
        if not reached:
            raise ModelError(f"{self.anatomy.architecture} runs none of its blocks on text, so it cannot be calibrated")
        self.reached = reached
        self._extras = {kind: extras and (None,) * len(extras) for kind, extras in self._extras.items()}

    def tail(self, ids: Tensor, hidden: Tensor, grad: bool = False) -> Any:
        """What the model makes of `hidden`, the output of its last block: its output object; `grad`: differentiable."""
        reached = max(self.reached)

        def replace(index: int, given: Tensor, call: Call) -> Tensor:
            return hidden if index == reached else given

        return self._run(ids, replace, grad)

    def entering(self, ids: Tensor) -> Tensor:
        """What enters the first block for token ids, with the graph of what led there."""
        found: list[Tensor] = []

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            found.append(hidden)
            raise _Stop

        self._run(ids, note, grad=True)
        return found[0]

    def around(self, ids: Tensor) -> Any:
        """The model's output for token ids if each block handed on its input: what lies outside the blocks, alone."""
        return self._run(ids, lambda _, hidden, __: hidden)

    def run(self, index: int, hidden: Tensor, call: Call, block: nn.Module | None = None) -> Tensor:
        """The output of block `index` (or of `block` in its place) [batch, tokens, hidden]."""
        module = self.block(index) if block is None else block
        return _tensor_of(call_block(module, hidden, call))

    def _run(
        self, ids: Tensor, listen: Callable[[int, Tensor, Call], Tensor], grad: bool = False, cache: Any = None
    ) -> Any:
        names = self.anatomy.block_names

        def passing(index: int) -> Callable[..., Any]:
            module = self.block(index)
            parameters = list(inspect.signature(module.forward).parameters)

            def forward(*args: Any, **kwargs: Any) -> Any:
                by_name = None if args else parameters[0]
                hidden = args[0] if args else kwargs.pop(parameters[0])
                call = Call(args[1:], kwargs, by_name)
                extras = self._returned(index, hidden, call)
                result = listen(index, hidden, call)
                return result if extras is None else (result, *extras)

            return forward

        blocks = [self.block(index) for index in range(len(names))]
        for index, block in enumerate(blocks):
            block.forward = passing(index)  # type: ignore[method-assign]
        try:
            with torch.set_grad_enabled(grad):
                options = call_options(self.model, cache)
                return self.model(input_ids=ids.to(self.device), **options)
        except _Stop:
            return None
        finally:
            for block in blocks:
                del block.forward

    def _returned(self, index: int, hidden: Tensor, call: Call) -> tuple[Any, ...] | None:
        """None if blocks of this class return a tensor, else what stands behind it in a tuple: from running one."""
        block = self.block(index)
        kind = type(block)
        if kind not in self._extras:
            forward = block.forward
            del block.forward
            try:
                self.load_block(index)
                output = call_block(block, hidden, call)
            finally:
                block.forward = forward  # type: ignore[method-assign]
                self.free_block(index)
            self._extras[kind] = output[1:] if isinstance(output, tuple) else None
        return self._extras[kind]


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


def call_options(model: nn.Module, cache: Any = None) -> dict[str, Any]:
    """Arguments with which a model answers with an object, and keeps its past in `cache`, or none; those it knows."""
    known = inspect.signature(model.forward).parameters
    wanted = {"use_cache": cache is not None, "return_dict": True}
    options: dict[str, Any] = {key: value for key, value in wanted.items() if key in known}
    return options if cache is None else {**options, past_argument(model): cache}


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) get their values as transformers gives them: from the
    innermost model that they are a part of."""
    owners: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        owners[path] = owner
        missing = [(leaf, buffer) for leaf, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for leaf, buffer in missing:
            setattr(module, leaf, torch.empty_like(buffer, device=device))
        if missing:
            owner._init_weights(module)  # pyright: ignore[reportPrivateUsage]
