"""The batches' runs through one block: each stops in front of every stage, until the stage's new weights are in place.

So a block is computed once for each batch, and still every stage sees what the quantized stages before it give. A
stopped run holds its activations; where they would take too much memory, or where experts make it unknown what a stage
will see, the block is run anew for each stage (`observe`).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.models.stream import Call, call_block
from bitgrain.pipeline.blockwise.batches import Pool, single_threaded
from bitgrain.pipeline.blockwise.stages import BLOCK_INPUT, Stage
from bitgrain.runtime.watch import Done, Key, Watch, parameters_of


@dataclass
class Seen:
    """What one run of a block on one batch showed.

    inputs     [tokens, in] by matrix; where a stage shares one input, under its first name only
    residuals  [tokens, out] by name: the residual stream that the layer is about to write into
    """

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    def only(self, stage: Stage) -> Seen:
        """What concerns one stage."""
        return Seen(
            {key: x for key, x in self.inputs.items() if key.name in stage.names},
            {name: x for name, x in self.residuals.items() if name in stage.names},
        )


class Walk(AbstractContextManager["Walk"]):
    """All batches on their way through one block, stage after stage."""

    @abstractmethod
    def seen(self, batch: int, stage: int) -> Seen:
        """What a batch's run is given at a stage; all earlier stages have been released."""

    def round_inputs(self, rounding: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """The block now rounds the inputs of these matrices, in front of which the runs stand. New runs are so by
        themselves."""

    @abstractmethod
    def release(self, stage: int) -> None:
        """The stage's weights are in place: the runs may go on to the next."""

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """The block's output for each batch; all stages have been released."""


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def observe(
    block: nn.Module, hidden: Tensor, call: Call, stages: Sequence[Stage], to_end: bool = False
) -> tuple[Seen, Tensor | None]:
    """Run `block` on a batch until all matrices of `stages` have been used: what they were given; with `to_end` also
    the block's output."""
    names = [name for stage in stages for name in stage.names]
    sources = {name: source for stage in stages for name, source in stage.residual.items()}
    follows = {name: stage.names[0] for stage in stages if stage.shared for name in stage.names}
    waiting = set(names)
    endless = to_end or any(not stage.shared for stage in stages)
    streams = {BLOCK_INPUT: hidden}
    parts: dict[Key, list[Tensor]] = defaultdict(list)
    seen = Seen()
    output: Any = None

    def product(key: Key, x: Tensor) -> None:
        if key.name not in waiting and key.name not in names:
            return
        if stacked[key.name] and key.expert is None and x.ndim == 3:  # all experts at once, tokens of others as zeros
            for expert, rows in enumerate(x):
                parts[Key(key.name, expert)].append(rows[rows.any(dim=-1)])
        elif follows.get(key.name, key.name) == key.name:
            parts[key].append(_flat(x))
        if key.name in sources and sources[key.name] in streams:
            seen.residuals[key.name] = _flat(streams[sources[key.name]])
        waiting.discard(key.name)
        if not waiting and not endless:
            raise Done

    def total(key: Key, _: Tensor, result: Tensor) -> None:
        streams[key.name] = result

    watched = list(dict.fromkeys([*names, *(source for source in sources.values() if source)]))
    parameters = parameters_of(block, watched)
    stacked = {name: parameter.ndim > 2 for name, parameter in parameters.items()}
    with suppress(Done), Watch(parameters, product, total, summed=set(sources.values())):
        output = call_block(block, hidden, call)
    seen.inputs = {key: torch.cat(x) if len(x) > 1 else x[0] for key, x in parts.items()}
    return seen, output[0] if isinstance(output, tuple) else output


class Runs(Walk):
    """One thread for each batch, `workers` of which compute at a time. A context manager: leaving it ends them all.

    block    with real weights, which the caller changes between `release` of one stage and the next
    inputs   the hidden states of each batch that enter it; stages: all shared
    """

    def __init__(
        self, block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[Call], stages: Sequence[Stage], workers: int
    ) -> None:
        self._block, self._stages = block, stages
        self._place = {name: i for i, stage in enumerate(stages) for name in stage.names}
        self._sources = {source for stage in stages for source in stage.residual.values()}
        self._free = threading.Semaphore(workers)
        self._changed = threading.Condition()
        self._released = 0
        self._ended = False
        self._seen: dict[tuple[int, int], Seen] = {}
        self._rounding: dict[str, Callable[[Tensor], Tensor]] = {}
        self._outputs: dict[int, Tensor | BaseException] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(i, hidden, calls[i]), name=f"bitgrain-run-{i}", daemon=True)
            for i, hidden in enumerate(inputs)
        ]
        for thread in self._threads:
            thread.start()

    def seen(self, batch: int, stage: int) -> Seen:
        """Waits until the run stands there. Empty if it never comes by."""
        with self._changed:
            self._changed.wait_for(lambda: (batch, stage) in self._seen or batch in self._outputs)
            outcome = self._outputs.get(batch)
            if isinstance(outcome, BaseException):
                raise outcome
            seen = self._seen.get((batch, stage), Seen())
        rounding = self._rounding.get(self._stages[stage].names[0])
        if rounding is None:
            return seen
        return Seen({key: rounding(x) for key, x in seen.inputs.items()}, seen.residuals)

    def round_inputs(self, rounding: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self._rounding.update(rounding)

    def release(self, stage: int) -> None:
        with self._changed:
            self._released = stage + 1
            self._seen = {key: seen for key, seen in self._seen.items() if key[1] > stage}
            self._changed.notify_all()

    def outputs(self) -> list[Tensor]:
        found: list[Tensor] = []
        for batch in range(len(self._threads)):
            with self._changed:
                self._changed.wait_for(lambda batch=batch: batch in self._outputs)
                outcome = self._outputs[batch]
            if isinstance(outcome, BaseException):
                raise outcome
            found.append(outcome)
        return found

    def __exit__(self, exc_type: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, batch: int, hidden: Tensor, call: Call) -> None:
        streams = {BLOCK_INPUT: hidden}

        def product(key: Key, x: Tensor) -> Tensor | None:
            place = self._place[key.name]
            if place < self._released or (batch, place) in self._seen:
                return None
            stage = self._stages[place]
            found = {name: _flat(streams[source]) for name, source in stage.residual.items() if source in streams}
            self._stop(batch, place, Seen({Key(stage.names[0]): _flat(x)}, found))
            rounding = self._rounding.get(key.name)
            return None if rounding is None else rounding(x)

        def total(key: Key, _: Tensor, result: Tensor) -> None:
            streams[key.name] = result

        outcome: Tensor | BaseException
        self._free.acquire()
        try:
            torch.zeros((), device=hidden.device)  # a kernel first: cuBLAS warns in a thread without a context
            watch = Watch(parameters_of(self._block, list(self._place)), product, total, summed=self._sources)
            with single_threaded(), torch.no_grad(), watch:
                output = call_block(self._block, hidden, call)
            outcome = output[0] if isinstance(output, tuple) else output
        except Exception as error:  # noqa: BLE001 - raised again in whoever waits for this run
            outcome = error
        finally:
            self._free.release()
        with self._changed:
            self._outputs[batch] = outcome
            self._changed.notify_all()

    def _stop(self, batch: int, place: int, seen: Seen) -> None:
        with self._changed:
            self._seen[batch, place] = seen
            self._changed.notify_all()
        self._free.release()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._released > place or self._ended)
        finally:
            self._free.acquire()
        if self._ended:
            raise Done


class Kept(Walk):
    """For a block that does not change: each batch runs once, and what every stage is given is kept until then."""

    def __init__(
        self, block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[Call], stages: Sequence[Stage]
    ) -> None:
        self._block, self._inputs, self._calls, self._stages = block, inputs, calls, stages
        self._seen: dict[int, dict[int, Seen]] = {}
        self._outputs: dict[int, Tensor] = {}

    def seen(self, batch: int, stage: int) -> Seen:
        if batch not in self._outputs:
            self._run(batch)
        return self._seen[batch][stage]

    def release(self, stage: int) -> None:
        for seen in self._seen.values():
            seen.pop(stage, None)

    def outputs(self) -> list[Tensor]:
        for batch in range(len(self._inputs)):
            if batch not in self._outputs:
                self._run(batch)
        return [self._outputs[batch] for batch in range(len(self._inputs))]

    def _run(self, batch: int) -> None:
        with single_threaded(), torch.no_grad():
            seen, output = observe(self._block, self._inputs[batch], self._calls[batch], self._stages, to_end=True)
        assert output is not None
        self._seen[batch] = {i: seen.only(stage) for i, stage in enumerate(self._stages)}
        self._outputs[batch] = output

    def __exit__(self, exc_type: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._seen.clear()


class Reruns(Walk):
    """The same in less memory: the block is run anew for each stage of each batch."""

    def __init__(
        self, block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[Call], stages: Sequence[Stage], pool: Pool
    ) -> None:
        self._block, self._inputs, self._calls, self._stages, self._pool = block, inputs, calls, stages, pool

    def seen(self, batch: int, stage: int) -> Seen:
        return observe(self._block, self._inputs[batch], self._calls[batch], [self._stages[stage]])[0]

    def release(self, stage: int) -> None:
        pass

    def outputs(self) -> list[Tensor]:
        def one(batch: int) -> Tensor:
            output = call_block(self._block, self._inputs[batch], self._calls[batch])
            return output[0] if isinstance(output, tuple) else output

        return list(self._pool.map(one, range(len(self._inputs))))

    def __exit__(self, exc_type: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        pass
