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

Entered = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module."""


class Spread(AbstractContextManager["Spread"]):
    """The experts of one stage of a block, as a context manager: until it is left, hooks stand in the block.

    block, inputs, calls  as for a Walk; several threads may ask at once
    """

    def __init__(self, block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[Call], stage: Stage) -> None:
        self._block, self._inputs, self._calls, self._stage = block, inputs, calls, stage
        self._here = threading.local()
        paths = dict.fromkeys(self._entrance(name) for name in stage.names)
        self._hooks = [
            block.get_submodule(path).register_forward_pre_hook(self._noting(path, len(paths)), with_kwargs=True)
            for path in paths
        ]

    def seen(self, batch: int, keys: Sequence[Key]) -> Seen:
        """What these matrices are given if all tokens of a batch go to each of them; some or all may be missing."""
        entered = self._enter(batch)
        experts: dict[tuple[str, int | None], set[Key]] = {}
        for key in keys:
            experts.setdefault((_module(key), key.expert), set()).add(key)
        seen = Seen()
        for (path, expert), its in experts.items():
            found: dict[Key, Tensor] = {}

            def product(key: Key, x: Tensor, its: set[Key] = its, found: dict[Key, Tensor] = found) -> None:
                if key in its:
                    found[key] = x.reshape(-1, x.shape[-1])
                    if len(found) == len(its):
                        raise Done

            given = entered.get(self._entrance(next(iter(its)).name))
            arguments = None if given is None else _for_one(given, expert)
            if arguments is not None:
                with suppress(Done), Watch(parameters_of(self._block, {key.name for key in its}), product):
                    self._block.get_submodule(path)(*arguments[0], **arguments[1])
            seen.inputs.update(found)
        return seen

    def _enter(self, batch: int) -> dict[str, Entered]:
        """With what the layer of experts is called in the block's own run, which ends there."""
        self._here.entered = entered = {}
        try:
            with suppress(Done):
                call_block(self._block, self._inputs[batch], self._calls[batch])
        finally:
            self._here.entered = None
        return entered

    def _entrance(self, name: str) -> str:
        """The module whose arguments are the tokens that enter the layer: the stack's, or that around a list."""
        place = None if self._block.get_parameter(name).ndim > 2 else list_place(name)
        return name.rpartition(".")[0] if place is None else place[0].rpartition(".")[0]

    def _noting(self, path: str, count: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered: dict[str, Entered] | None = getattr(self._here, "entered", None)
            if entered is None:
                return
            entered[path] = args, kwargs
            if len(entered) == count:
                raise Done

        return before

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


def _for_one(given: Entered, expert: int | None) -> Entered | None:
    """The arguments with which all tokens go to one expert. None: they do not say where tokens go.

    expert: its place in the stack; None: a module of its own, which is given what entered the layer
    """
    args, kwargs = given
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if expert is None:
        return ((values[0].reshape(-1, values[0].shape[-1]),), {}) if values else None
    index = next((v for v in values if v.ndim == 2 and v.dtype in (torch.int64, torch.int32)), None)
    if index is None:
        return None

    def one(value: Any) -> Any:
        if value is index:
            return torch.full_like(index[:, :1], expert)
        same = isinstance(value, Tensor) and value.shape == index.shape
        return torch.ones_like(value[:, :1]) if same else value

    return tuple(one(value) for value in args), {key: one(value) for key, value in kwargs.items()}


def _module(key: Key) -> str:
    """The module that is called for an expert: that of the stack, or its own."""
    place = list_place(key.name) if key.expert is None else None
    return key.name.rpartition(".")[0] if place is None else f"{place[0]}.{place[1]}"
