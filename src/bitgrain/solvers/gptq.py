"""GPTQ: column after column is rounded, and what each rounding did to the outputs is undone in the columns to come.

Frantar et al., arXiv 2210.17323, algorithm 1. With U^T U = H^-1, U upper triangular, rounding column i with the error
e = (w_i - q_i) / U_ii moves the later columns by -e U_i,j; the sum of e^2 over all columns is the row's objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import Granularity, QTensor, QuantSpec
from bitgrain.numerics.nested import has_rows_of_its_own
from bitgrain.numerics.quantize import check_finite
from bitgrain.numerics.ranges import Range, get_range
from bitgrain.solvers.apart import solve_apart
from bitgrain.solvers.base import Moments, Solution, register_solver, required
from bitgrain.solvers.descend import descend
from bitgrain.solvers.linalg import check_hessian, inverse_factor
from bitgrain.solvers.refine import refine
from bitgrain.solvers.rtn import round_without_tokens
from bitgrain.solvers.steps import Lanes, Steps, fit
from bitgrain.solvers.storage import Storage

_LANES = 4096  # rows (times candidates) that are worked on together; fixed, so results never depend on the machine
ORDERS = ("act", "group", "none")


@register_solver("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Error feedback through the inverse Hessian, for every format, granularity and storage of scales.

    damping        added to the diagonal of H, relative to its mean
    order          "act": columns by falling diagonal of H, scales chosen from the original weights; "group": groups by
                   the mean of that diagonal and columns by it inside their group, scales fitted on the updated weights
                   of each group; "none": columns as they are, scales fitted likewise. None needs a g_idx at run time.
    block          columns that are updated together, for speed alone
    candidates     how ranges are chosen: "spec" is the spec's own range, others are names of ranges, "*0.92" scales the
                   limits. With several, each row (each row of tiles) keeps the one under which its own loss is lowest.
    sweeps         of coordinate descent afterwards, see `refine`
    scale_updates  whether these also fit scales and zero points anew
    """

    damping: float = 0.01
    order: str = "act"
    block: int = 64
    candidates: tuple[str, ...] = ("spec",)
    sweeps: int = 0
    scale_updates: bool = True
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise SchemeError(f"gptq: order is one of {', '.join(ORDERS)}, not {self.order!r}")
        if not (0 <= self.damping <= 1 and self.block >= 1 and self.sweeps >= 0 and self.candidates):
            raise SchemeError(f"gptq: 0 <= damping <= 1, block >= 1, sweeps >= 0 and candidates are needed, not {self}")
        for text in self.candidates:
            parse_candidate(text, None)

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`. Without tokens the weights are rounded to nearest, and a note says so."""
        moments = required(moments, "gptq", name)
        if spec.outliers:
            return solve_apart(self.solve, weight, spec, moments, outer_scale=outer_scale, name=name)
        if moments.tokens == 0:
            return round_without_tokens(weight, spec, outer_scale=outer_scale, name=name)
        x = weight.to(torch.float32)
        check_finite(x, name)
        check_hessian(moments.hessian, x.shape[1], name)
        order = column_order(moments.importance, spec.granularity, self.order)
        upper, damped = inverse_factor(moments.hessian, self.damping, order=order, name=name)
        choices = [parse_candidate(text, spec.range) for text in self.candidates]
        static = self.order == "act" or spec.granularity.cols is None
        search = _Search(x, spec, moments.importance, order, upper.t().contiguous(), choices, static, self.block, name)
        q = search.run(outer_scale)
        if self.sweeps:
            matrix = damped.matrix.to(torch.float32)
            q = refine(x, q, matrix, sweeps=self.sweeps, scales=self.scale_updates, name=name)
        return Solution(q, "gptq", {"damping": damped.damping}, damped.notes)


def parse_candidate(text: str, own: Range | None) -> tuple[Range, float]:
    """ "minmax*0.92" -> (the range, 0.92); "spec" is `own`. Raises SchemeError."""
    name, star, number = text.partition("*")
    try:
        factor = float(number) if star else 1.0
    except ValueError:
        factor = 0.0
    if factor <= 0:
        raise SchemeError(f"gptq: a candidate is a range or range*factor, for instance minmax*0.92, not {text!r}")
    name = name.strip()
    return (own or get_range("minmax") if name == "spec" else get_range(name)), factor


def column_order(importance: Tensor, granularity: Granularity, order: str) -> Tensor:
    """The order in which columns are rounded, int64 [in]; see `GPTQ`. Equal ones stay in their order."""
    n = importance.shape[0]
    if order == "none":
        return torch.arange(n, device=importance.device)
    columns = torch.argsort(importance, descending=True, stable=True)
    width = granularity.cols or n
    if order == "act" or width >= n:
        return columns
    tile = torch.arange(n, device=importance.device) // width
    means = torch.stack([part.mean() for part in importance.double().split(width)])
    rank = torch.empty_like(tile[: means.shape[0]])
    rank[torch.argsort(means, descending=True, stable=True)] = torch.arange(means.shape[0], device=rank.device)
    return columns[torch.argsort(rank[tile[columns]], stable=True)]


@dataclass(frozen=True)
class _Search:
    """One matrix on its way. Columns are kept as contiguous vectors over the rows of all candidates ("lanes")."""

    weight: Tensor  # float32 [out, in]
    spec: QuantSpec
    importance: Tensor  # [in]
    order: Tensor  # [in]
    factor: Tensor  # U^T, float32 [in, in], in the order
    choices: list[tuple[Range, float]]
    static: bool
    block: int
    name: str

    def run(self, outer_scale: Tensor | None) -> QTensor:
        """Codes, scales and zero points."""
        rows = self.weight.shape[0]
        chosen = [self._fit(self.weight, self.importance, c) for c in range(len(self.choices))]
        storages = self._storages(chosen, outer_scale)
        steps = [storage.round(*ideal) for storage, ideal in zip(storages, chosen, strict=True)]
        tile_rows = self.spec.granularity.tile((rows, 1))[0]
        lanes = max(1, _LANES // (len(self.choices) * tile_rows)) * tile_rows
        step = rows if self.spec.granularity.rows is None else lanes
        parts = [self._rows(i, min(i + step, rows), steps, storages) for i in range(0, rows, step)]
        scale = torch.cat([part[1].scale for part in parts])
        zeros = [part[1].zero for part in parts if part[1].zero is not None]
        storage, best = storages[0], torch.cat([part[2] for part in parts])
        for c, other in enumerate(storages[1:], 1):
            storage = storage if other is storage else storage.chosen(other, best == c)
        back = torch.argsort(self.order)
        codes = torch.cat([part[0][back].t().contiguous() for part in parts])
        return storage.pack(codes, Steps(scale, torch.cat(zeros) if zeros else None))

    def _storages(self, chosen: list[tuple[Tensor, Tensor | None]], outer_scale: Tensor | None) -> list[Storage]:
        """For each candidate: one for all, but where the rows' outer scales are their own."""
        apart = outer_scale is None and has_rows_of_its_own(self.spec)
        found = [
            Storage.choose(self.weight, self.spec, *ideal, self.importance, outer_scale, self.name)
            for ideal in (chosen if apart else chosen[:1])
        ]
        return found if apart else found * len(chosen)

    def _fit(self, weight: Tensor, importance: Tensor, candidate: int) -> tuple[Tensor, Tensor | None]:
        return fit(weight, self.spec, self.choices[candidate][0], importance, self.choices[candidate][1])

    def _rows(self, start: int, stop: int, steps: list[Steps], storages: list[Storage]) -> tuple[Tensor, Steps, Tensor]:
        """For rows that begin and end with a tile: codes [in, rows], in the order, and steps of the best candidate of
        each row of tiles, and which that is, [down]."""
        spec, count, rows = self.spec, len(self.choices), stop - start
        tile_rows, width = spec.granularity.tile(tuple(self.weight.shape))
        bands = slice(start // tile_rows, -(-stop // tile_rows))
        steps = [Steps(s.scale[bands].clone(), None if s.zero is None else s.zero[bands].clone()) for s in steps]
        lanes = Lanes(spec, steps[0].scale.shape[1], rows * count, self.weight.device)
        for c in range(count):
            lanes.put(steps[c], tile_rows, rows, c * rows)
        columns = self.weight[start:stop].t().contiguous()[self.order]
        if count > 1:
            columns = columns.repeat(1, count)

        def fit_tile(k: int, first: int, last: int) -> None:
            """New scales for the tile column k, whose updated weights are columns[first:last]."""
            importance = self.importance[self.order[first:last]]
            for c, of_candidate in enumerate(steps):
                updated = columns[first:last, c * rows : (c + 1) * rows].t().contiguous()
                fitted = storages[c].round(*self._fit(updated, importance, c), bands, slice(k, k + 1))
                lanes.put(fitted, tile_rows, rows, c * rows, k)
                of_candidate.scale[:, k : k + 1] = fitted.scale
                if of_candidate.zero is not None and fitted.zero is not None:
                    of_candidate.zero[:, k : k + 1] = fitted.zero

        tiles: list[int] = (self.order // width).tolist()
        numbers, loss = descend(columns, self.factor, tiles, lanes, self.block, None if self.static else fit_tile)
        if count == 1:
            first = torch.zeros(steps[0].scale.shape[0], dtype=torch.int64, device=numbers.device)
            return self.spec.format.encode(numbers), steps[0], first
        losses = F.pad(loss.view(count, rows), (0, steps[0].scale.shape[0] * tile_rows - rows))
        best = losses.view(count, -1, tile_rows).sum(dim=-1).argmin(dim=0)
        by_row = best.repeat_interleave(tile_rows)[:rows]
        numbers = numbers.view(-1, count, rows).gather(1, by_row.expand(numbers.shape[0], 1, rows)).squeeze(1)
        zeros = [s.zero for s in steps if s.zero is not None]
        picked = Steps(_pick([s.scale for s in steps], best), _pick(zeros, best) if zeros else None)
        return self.spec.format.encode(numbers), picked, best


def _pick(tables: list[Tensor], best: Tensor) -> Tensor:
    """Row i of the table best[i]."""
    return torch.stack(tables, dim=1)[torch.arange(best.shape[0], device=best.device), best]
