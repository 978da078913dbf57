"""All tokens that enter a layer of experts, shown to any of them beside the run in which the router decides.

Nothing of it flows on: the block's own run is as ever. What an expert would compute of tokens that went elsewhere is
asked of the experts' module itself, called with one choice for all tokens, so biases, gates and input quantizers are
the model's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitgrain.models.stream import Call, call_block
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage, leaf_of
from bitgrain.pipeline.experts import list_place
from bitgrain.runtime.watch import Done, Key, Watch, parameters_of
from bitgrain.solvers import Moments

_AT_ONCE = 8
"""Experts whose inputs and moments are held at a time."""
_COMPARED = 4
"""Tokens of an expert that are looked for among those that entered the module around it."""

Entered = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module."""


class Spread(AbstractContextManager["Spread"]):
    """The experts of one stage of a block, as a context manager: until it is left, hooks stand in the block.

    block, inputs, calls  as for a Walk; several threads may ask at once
    """

    def __init__(self, block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[Call], stage: Stage) -> None:
        self._block, self._inputs, self._calls = block, inputs, calls
        self._here = threading.local()
        self._hooks: list[RemovableHandle] = []
        lists = {name: place for name in stage.names if (place := self._listed(name)) is not None}
        self._entrance = {
            name: lists[name][0].rpartition(".")[0] if name in lists else name.rpartition(".")[0]
            for name in stage.names
        }
        for name in stage.names:
            if name in lists:
                self._listen(f"{lists[name][0]}.{lists[name][1]}", self._inside, self._entrance[name])
        for path in dict.fromkeys(self._entrance.values()):
            around = any(self._entrance[name] == path for name in lists)
            self._listen(path, self._around if around else self._stack, path)

    def seen(self, batch: int, keys: Sequence[Key]) -> Seen:
        """What these matrices are given if all tokens of a batch go to each of them; some or all may be missing."""
        entered = self._enter(batch)
        experts: dict[tuple[str, int | None], set[Key]] = {}
        for key in keys:
            experts.setdefault((self._module(key), key.expert), set()).add(key)
        seen = Seen()
        for (path, expert), its in experts.items():
            found: dict[Key, Tensor] = {}

            def product(key: Key, x: Tensor, its: set[Key] = its, found: dict[Key, Tensor] = found) -> None:
                if key in its:
                    found[key] = x.reshape(-1, x.shape[-1])
                    if len(found) == len(its):
                        raise Done

            given = entered.get(self._entrance[next(iter(its)).name])
            if given is not None and expert is not None:
                given = _for_one(given, expert)
            if given is not None:
                with suppress(Done), Watch(parameters_of(self._block, {key.name for key in its}), product):
                    self._block.get_submodule(path)(*given[0], **given[1])
            seen.inputs.update(found)
        return seen

    def _enter(self, batch: int) -> dict[str, Entered]:
        """What the experts can be called with, by their entrance: from the block's own run, which ends there."""
        entered: dict[str, Entered] = {}
        self._here.entered, self._here.tokens = entered, None
        try:
            with suppress(Done):
                call_block(self._block, self._inputs[batch], self._calls[batch])
        finally:
            self._here.entered = None
        return entered

    def _listed(self, name: str) -> tuple[str, int] | None:
        return None if self._block.get_parameter(name).ndim > 2 else list_place(name)

    def _module(self, key: Key) -> str:
        """The module that is called for an expert: that of the stack, or its own."""
        place = self._listed(key.name)
        return key.name.rpartition(".")[0] if place is None else f"{place[0]}.{place[1]}"

    def _listen(self, path: str, listener: Callable[[dict[str, Entered], str, Entered], None], entrance: str) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered: dict[str, Entered] | None = getattr(self._here, "entered", None)
            if entered is not None:
                listener(entered, entrance, (args, kwargs))

        self._hooks.append(self._block.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))

    def _stack(self, entered: dict[str, Entered], entrance: str, given: Entered) -> None:
        entered[entrance] = given
        raise Done

    def _around(self, entered: dict[str, Entered], entrance: str, given: Entered) -> None:
        """The module around a list is called: what it is given might be what its experts choose from."""
        self._here.tokens = next((x for x in (*given[0], *given[1].values()) if isinstance(x, Tensor)), None)

    def _inside(self, entered: dict[str, Entered], entrance: str, given: Entered) -> None:
        """An expert of a list is called: whether its tokens are among those, tells."""
        tokens, mine = self._here.tokens, next((x for x in given[0] if isinstance(x, Tensor)), None)
        if tokens is None or mine is None or not len(mine):
            return
        rows = tokens.reshape(-1, tokens.shape[-1])
        if mine.shape[-1] == rows.shape[-1] and all(bool((rows == one).all(-1).any()) for one in mine[:_COMPARED]):
            entered[entrance] = (rows,), {}
        raise Done

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def whole_moments(
    block: nn.Module,
    inputs: Sequence[Tensor],
    calls: Sequence[Call],
    stage: Stage,
    keys: Sequence[Key],
    pool: Pool,
    label: str,
    noted: Callable[[int, Seen], None] | None = None,
) -> dict[Key, Moments]:
    """The moments of some of a stage's expert matrices over all tokens of their layer, summed batch by batch.

    Experts that read the layer's input itself have one object, and `noted` is told only of the first what each batch
    shows. What cannot be asked is left out: a module that is not told by indices which expert a token goes to.
    Raises NumericsError for NaN and Inf, naming the layer.
    """
    kinds: dict[str, list[Key]] = {}
    for key in keys:
        kinds.setdefault(leaf_of(key.name), []).append(key)
    found: dict[Key, Moments] = {}
    if not kinds:
        return found
    with Spread(block, inputs, calls, stage) as spread:

        def moments_of(some: Sequence[Key]) -> dict[Key, Moments]:
            def seen(batch: int) -> Seen:
                shown = spread.seen(batch, some)
                if noted is not None:
                    noted(batch, shown)
                return shown

            return gather_moments(stage, len(inputs), seen, None, pool, label)

        for kind in kinds.values():
            with single_threaded(), torch.no_grad():
                tried = list(spread.seen(0, kind[:2]).inputs.values())
            if len(tried) == 2 and torch.equal(*tried):
                found |= dict.fromkeys(kind, moments_of(kind[:1])[kind[0]])
            elif tried:
                for place in range(0, len(kind), _AT_ONCE):
                    found |= moments_of(kind[place : place + _AT_ONCE])
    return found


def _for_one(given: Entered, expert: int) -> Entered | None:
    """The arguments of a stack with which all tokens go to one expert. None: they do not say where tokens go."""
    args, kwargs = given
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    index = next((v for v in values if v.ndim == 2 and v.dtype in (torch.int64, torch.int32)), None)
    if index is None:
        return None

    def one(value: Any) -> Any:
        if value is index:
            return torch.full_like(index[:, :1], expert)
        weights = isinstance(value, Tensor) and value.shape == index.shape
        return torch.ones_like(value[:, :1]) if weights else value

    return tuple(one(value) for value in args), {key: one(value) for key, value in kwargs.items()}
