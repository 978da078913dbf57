"""Moments of the inputs of one stage, summed over the calibration batches in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.kernels.gram import gram, mirror
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments


@dataclass
class _Sums:
    hessian: Tensor  # the upper triangle, see `kernels.gram`
    tokens: int
    cross: Tensor | None = None
    residual: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        self.tokens += other.tokens
        self.hessian += other.hessian
        self.cross = None if self.cross is None or other.cross is None else self.cross.add_(other.cross)
        for name, tensor in other.residual.items():
            if name in self.residual:
                self.residual[name] += tensor
            else:
                self.residual[name] = tensor


def gather_moments(
    stage: Stage,
    batches: int,
    seen: Callable[[int], Seen],
    full: Callable[[int], Seen] | None,
    pool: Pool,
    label: str,
) -> dict[Key, Moments]:
    """Moments for each matrix of a stage, by what it was seen as; members of a shared stage each have an entry.

    seen     batch -> inputs as the quantized layers see them
    full     batch -> inputs of the full-precision model at the same place, for the cross moments; None: none
    Raises NumericsError that names the layer for NaN or Inf among the activations.
    """

    def one(batch: int) -> dict[Key, _Sums]:
        now, then = seen(batch), None if full is None else full(batch)
        found: dict[Key, _Sums] = {}
        for key, x in now.inputs.items():
            sums = _Sums(gram(x), len(x))
            members = stage.names if stage.shared else (key.name,)
            # experts see other tokens than those of the full-precision model, even where they are as many
            if then is not None and stage.shared and key in then.inputs and len(then.inputs[key]) == len(x):
                sums.cross = then.inputs[key].T @ x
                for name in members:
                    if name in now.residuals and name in then.residuals:
                        sums.residual[name] = (then.residuals[name] - now.residuals[name]).T @ x
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
        if n == 0:
            continue
        hessian = mirror(sums.hessian.div_(n))
        cross = None if sums.cross is None else sums.cross.div_(n)
        for name in stage.names if stage.shared else (key.name,):
            residual = sums.residual.get(name)
            result[Key(name, key.expert)] = Moments(
                hessian,
                n,
                cross,
                None if residual is None else residual / n,
            )
    return result
