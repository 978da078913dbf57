"""Moments of the inputs of one stage, summed over the calibration batches in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitgrain.errors import NumericsError
from bitgrain.models.stream import Call, call_block
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.stages import Stage
from bitgrain.runtime.watch import Done, Key, Watch, parameters_of
from bitgrain.solvers import Moments


@dataclass
class Seen:
    """What one run of a block on one batch showed: inputs [tokens, in] by matrix, residuals [tokens, out] by name."""

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    def only(self, names: Sequence[str]) -> Seen:
        return Seen(
            {key: x for key, x in self.inputs.items() if key.name in names},
            {name: x for name, x in self.residuals.items() if name in names},
        )


def observe(block: nn.Module, hidden: Tensor, call: Call, stages: Sequence[Stage], residuals: bool) -> Seen:
    """Run `block` on a batch until all matrices of `stages` have been used, and keep what they were given.

    Where a stage shares one input, it is kept under its first name only.
    """
    names = [name for stage in stages for name in stage.names]
    follows = {name: stage.names[0] for stage in stages if stage.shared for name in stage.names}
    writers = {name for stage in stages for name in stage.writers} if residuals else set[str]()
    endless = any(not stage.shared for stage in stages)
    parts: dict[Key, list[Tensor]] = defaultdict(list)
    seen = Seen()
    waiting = set(names)
    unsummed = set(writers)

    def product(key: Key, x: Tensor) -> None:
        if follows.get(key.name, key.name) == key.name:
            parts[key].append(x.reshape(-1, x.shape[-1]))
        waiting.discard(key.name)
        if key.name not in writers:  # what is added to the residual stream must be computed first
            leave()

    def total(key: Key, other: Tensor) -> None:
        if key.name in unsummed:
            unsummed.discard(key.name)
            seen.residuals[key.name] = other.reshape(-1, other.shape[-1])
            leave()

    def leave() -> None:
        if not waiting and not unsummed and not endless:
            raise Done

    with suppress(Done), Watch(parameters_of(block, names), product, total if writers else None):
        call_block(block, hidden, call)
    seen.inputs = {key: torch.cat(x) if len(x) > 1 else x[0] for key, x in parts.items()}
    return seen


@dataclass
class _Sums:
    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    residual: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        self.tokens += other.tokens
        self.hessian += other.hessian
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        for mine, theirs in ((self.residual, other.residual), (self.sensitivity, other.sensitivity)):
            for name, tensor in theirs.items():
                if name in mine:
                    mine[name] += tensor
                else:
                    mine[name] = tensor


def gather_moments(
    stage: Stage,
    batches: int,
    seen: Callable[[int], Seen],
    full: Callable[[int], Seen] | None,
    weights: Callable[[str, int], Tensor | None] | None,
    pool: Pool,
    label: str,
) -> dict[Key, Moments]:
    """Moments for each matrix of a stage, by what it was seen as; members of a shared stage each have an entry.

    seen     batch -> inputs as the quantized layers see them
    full     batch -> inputs of the full-precision model at the same place, for the cross moments; None: none
    weights  (name, batch) -> |g|^2 of each token [tokens], or None where there is no gradient of that batch
    Raises NumericsError that names the layer for NaN or Inf among the activations.
    """

    def one(batch: int) -> dict[Key, _Sums]:
        now, then = seen(batch), None if full is None else full(batch)
        found: dict[Key, _Sums] = {}
        for key, x in now.inputs.items():
            sums = _Sums(x.T @ x, len(x))
            members = stage.names if stage.shared else (key.name,)
            if then is not None and key.expert is None and key in then.inputs and len(then.inputs[key]) == len(x):
                sums.cross = then.inputs[key].T @ x
                for name in members:
                    if name in now.residuals and name in then.residuals:
                        sums.residual[name] = (then.residuals[name] - now.residuals[name]).T @ x
            for name in members if weights is not None and key.expert is None else ():
                weight = weights(name, batch) if weights is not None else None
                if weight is not None and len(weight) == len(x):
                    sums.sensitivity[name] = x.T @ (x * weight[:, None])
            found[key] = sums
        return found

    totals: dict[Key, _Sums] = {}
    for found in pool.map(one, range(batches)):
        for key, sums in found.items():
            if key in totals:
                totals[key].add(sums)
            else:
                totals[key] = sums
    result: dict[Key, Moments] = {}
    for key, sums in totals.items():
        if not bool(torch.isfinite(sums.hessian.sum()).item()):
            raise NumericsError(
                f"{label}.{key.name}: its inputs hold NaN or Inf, or are too large for float32; "
                "the model overflows on the calibration text, check its weights and dtype"
            )
        n = sums.tokens
        hessian = sums.hessian.div_(n)
        cross = None if sums.cross is None else sums.cross.div_(n)
        for name in stage.names if stage.shared else (key.name,):
            residual, sensitivity = sums.residual.get(name), sums.sensitivity.get(name)
            result[Key(name, key.expert)] = Moments(
                hessian,
                n,
                cross,
                None if residual is None else residual / n,
                None if sensitivity is None else sensitivity / n,
            )
    return result


def nbytes_of(seen: Mapping[Key, Tensor] | Mapping[str, Tensor]) -> int:
    """Memory of what was seen; views of one tensor count once."""
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in seen.values()}.values())
