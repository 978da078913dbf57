"""Coordinate descent on the objective of a layer, tr((W - Q) H (W - Q)^T), from codes that some solver found.

Each weight in turn takes the code nearest to its conditional optimum, given all the others: with B = (W - Q) H, that is
q_j + B_j / H_jj (QuantEase, arXiv 2309.01885, equation 6). Before the codes of each group its scale, and its real zero
point, takes the value that is best for the codes it has (least squares), if anything is gained after it is stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.numerics import QTensor
from bitgrain.numerics.quantize import check_finite
from bitgrain.numerics.scales import round_scale
from bitgrain.solvers.linalg import check_hessian
from bitgrain.solvers.objective import row_errors
from bitgrain.solvers.steps import Lanes, Steps, per_row
from bitgrain.solvers.storage import Storage

_LANES = 4096  # rows that are worked on together; fixed, so results never depend on the machine
_BLOCK = 32  # columns that are brought up to date one by one
_UNIT = 128  # columns (whole tiles) whose part of B is computed together
_FACTOR = 3.0  # a scale changes by no more than this at once
_LEAST = 1e-6  # and by no less than this share of it


def refine(
    weight: Tensor, q: QTensor, hessian: Tensor, *, sweeps: int = 6, scales: bool = True, name: str = "weight"
) -> QTensor:
    """`q` with codes and scales that lie lower, row by row, on tr((W - Q) H (W - Q)^T); never higher.

    weight   [out, in]; hessian [in, in], with a positive diagonal (damped)
    sweeps   at most so many; they end when nothing moves any more
    scales   whether scales and real zero points are fitted too; where a tile spans several rows only codes move

    A row whose objective would rise (by rounding errors of the descent itself) keeps what it had.
    Raises NumericsError for NaN, Inf or a diagonal that is not positive, naming the layer.
    """
    check_hessian(hessian, weight.shape[1], name)
    if not bool((hessian.diagonal() > 0).all().item()):
        raise NumericsError(f"{name}: the diagonal of its Hessian has zeros; coordinate descent needs a damped Hessian")
    x, matrix = weight.to(torch.float32), hessian.to(torch.float32)
    check_finite(x, name)
    spec = q.spec
    tile_rows = spec.granularity.tile(q.shape)[0]
    storage, steps = Storage.of(q, name), Steps.of(q)
    # scales that their storage would not leave as they are cannot be told apart from moved ones
    movable = scales and spec.granularity.rows == 1 and torch.equal(round_scale(steps.scale, spec), steps.scale)
    by_row = Steps(
        per_row(steps.scale, tile_rows, x.shape[0]),
        None if steps.zero is None else per_row(steps.zero, tile_rows, x.shape[0]),
    )
    numbers = spec.format.decode(q.codes)
    for start in range(0, x.shape[0], _LANES):
        rows = slice(start, min(start + _LANES, x.shape[0]))
        part = Steps(by_row.scale[rows], None if by_row.zero is None else by_row.zero[rows])
        descent = _Descent(x[rows], numbers[rows], part, matrix, q, storage if movable else None, rows)
        for _ in range(sweeps):
            if not descent.sweep():
                break
        numbers[rows] = descent.numbers.t()
        if movable:
            steps.scale[rows] = descent.lanes.scale.t()
            if steps.zero is not None and descent.lanes.offset is not None:
                steps.zero[rows] = descent.lanes.offset.t()
    codes = spec.format.encode(numbers)
    found = storage.pack(codes, steps) if movable else replace(q, codes=codes)
    worse = row_errors(x, found, matrix) > row_errors(x, q, matrix)
    if not bool(worse.any().item()):
        return found
    codes[worse] = q.codes[worse]
    if not movable:
        return replace(q, codes=codes)
    before = Steps.of(q)
    steps.scale[worse] = before.scale[worse]
    if steps.zero is not None and before.zero is not None:
        steps.zero[worse] = before.zero[worse]
    return storage.pack(codes, steps)


class _Descent:
    """Some rows of a matrix on their way down. Columns are kept as contiguous vectors over these rows.

    numbers  float32 [in, rows]: the format's numbers
    lanes    scales and zero points
    error    float32 [in, rows]: W - Q
    """

    def __init__(
        self, weight: Tensor, numbers: Tensor, steps: Steps, hessian: Tensor, q: QTensor, storage: Storage | None,
        rows: slice,
    ) -> None:  # fmt: skip
        """weight, numbers [rows, in]; steps [rows, across], one for each row; storage: None if scales stay."""
        self.hessian, self.storage, self.rows = hessian, storage, rows
        self.width = q.spec.granularity.tile(q.shape)[1]
        self.real_zero, self.least_minimum = q.spec.zero_point == "real", q.spec.least_minimum
        self.lanes = Lanes(q.spec, steps.scale.shape[1], weight.shape[0], weight.device)
        self.lanes.put(steps, 1, weight.shape[0])
        # copies, also where a single row is contiguous either way
        self.numbers = numbers.t().clone(memory_format=torch.contiguous_format)
        self.error = weight.t().clone(memory_format=torch.contiguous_format)
        self.diagonal: list[float] = hessian.diagonal().tolist()
        for j in range(self.error.shape[0]):
            self.error[j] -= self.lanes.values(self.numbers[j], j // self.width)

    def sweep(self) -> bool:
        """Every group's scale and every code once. Whether anything moved."""
        n = self.error.shape[0]
        unit = self.width * max(1, _UNIT // self.width)
        moved = False
        for a in range(0, n, unit):
            b = min(a + unit, n)
            slope = self.hessian[a:b] @ self.error  # B^T of these columns, kept up to date
            if self.storage is not None:
                for p in range(a, b, self.width):
                    q = min(p + self.width, b)
                    if self.lanes.minimum is not None:
                        moved |= self._move_both(p, q, a, b, slope)
                        continue
                    moved |= self._move_scale(p, q, a, b, slope)
                    moved |= self.real_zero and self._move_zero(p, q, a, b, slope)
            moved |= self._move_codes(a, b, slope)
        return moved

    def _move_codes(self, a: int, b: int, slope: Tensor) -> bool:
        """The codes of columns a to b, one column after the other."""
        lanes, moved = self.lanes, False
        for start in range(a, b, _BLOCK):
            stop = min(start + _BLOCK, b)
            change = torch.empty_like(self.error[start:stop])
            for j in range(start, stop):
                k, line = j // self.width, slope[j - a]
                if j > start:
                    line.addmv_(change[: j - start].t(), self.hessian[j, start:j], alpha=-1.0)
                old = lanes.values(self.numbers[j], k)
                best = torch.add(old, line, alpha=1.0 / self.diagonal[j])
                new = lanes.values(lanes.round_into(self.numbers[j], best, k), k)
                torch.sub(new, old, out=change[j - start])
            self.error[start:stop] -= change
            if stop < b:
                slope[stop - a :].addmm_(self.hessian[stop:b, start:stop], change, alpha=-1.0)
            moved = moved or bool(change.any().item())
        return moved

    def _move_scale(self, p: int, q: int, a: int, b: int, slope: Tensor) -> bool:
        """The scales of the tile of columns p to q: along its codes u the objective is -2 t u.B + t^2 u H u."""
        assert self.storage is not None
        k, scale = p // self.width, self.lanes.scale[p // self.width]
        u = self.numbers[p:q] if self.lanes.zero is None else self.numbers[p:q] - self.lanes.zero[k]
        curve = (u * (self.hessian[p:q, p:q] @ u)).sum(dim=0, dtype=torch.float64)
        gain = (u * slope[p - a : q - a]).sum(dim=0, dtype=torch.float64)
        best = (scale + gain / curve).to(torch.float32)
        ratio = best / scale  # positive: a scale keeps its sign
        sound = (ratio > 1 / _FACTOR) & (ratio < _FACTOR)
        best = torch.where(sound, best, scale).unsqueeze(1)
        rounded = self.storage.round(best, None, self.rows, slice(k, k + 1)).scale.squeeze(1)
        change = (rounded - scale).double()
        better = 2 * change * gain > change * change * curve
        better &= (rounded * scale > 0) & (change.abs() > _LEAST * scale.abs())
        if not bool(better.any().item()):
            return False
        moved = u * torch.where(better, rounded - scale, 0.0)
        self.lanes.put(Steps(torch.where(better, rounded, scale).unsqueeze(1), None), 1, scale.shape[0], 0, k)
        self._shift(p, q, a, b, slope, moved)
        return True

    def _move_zero(self, p: int, q: int, a: int, b: int, slope: Tensor) -> bool:
        """The real zero points of the tile of columns p to q: all of its weights move by the same."""
        assert self.storage is not None
        assert self.lanes.zero is not None
        k, scale, zero = p // self.width, self.lanes.scale[p // self.width], self.lanes.zero[p // self.width]
        curve = self.hessian[p:q, p:q].sum(dtype=torch.float64)
        gain = slope[p - a : q - a].sum(dim=0, dtype=torch.float64)
        best = (zero - gain / curve / scale).to(torch.float32)
        best = torch.where(torch.isfinite(best), best, zero).unsqueeze(1)
        rounded = self.storage.round_zero(best).squeeze(1)
        change = ((zero - rounded) * scale).double()
        better = (2 * change * gain > change * change * curve) & (change.abs() > _LEAST * scale.abs())
        if not bool(better.any().item()):
            return False
        moved = torch.where(better, (zero - rounded) * scale, 0.0).expand(q - p, -1).contiguous()
        self.lanes.put(Steps(scale.unsqueeze(1).clone(), torch.where(better, rounded, zero).unsqueeze(1)),
                       1, scale.shape[0], 0, k)  # fmt: skip
        self._shift(p, q, a, b, slope, moved)
        return True

    def _move_both(self, p: int, q: int, a: int, b: int, slope: Tensor) -> bool:
        """The scales and minima of the tile of columns p to q together: Q moves by ds u - dm, u being its codes.

        Of the scales as they are, the best ones as they are stored and the next ones on the other side, each with the
        minimum that suits it, the best is kept.
        """
        assert self.storage is not None
        assert self.lanes.minimum is not None
        k = p // self.width
        place, scale, minimum = slice(k, k + 1), self.lanes.scale[k], self.lanes.minimum[k]
        u, line, square = self.numbers[p:q], slope[p - a : q - a], self.hessian[p:q, p:q]
        curves = square @ u
        uu, cross = (u * curves).sum(dim=0, dtype=torch.float64), -curves.sum(dim=0, dtype=torch.float64)
        ones = square.sum(dtype=torch.float64)
        gain, drop = (u * line).sum(dim=0, dtype=torch.float64), -line.sum(dim=0, dtype=torch.float64)
        ideal = scale + (gain * ones - drop * cross) / (uu * ones - cross * cross)
        ratio = ideal / scale
        ideal = torch.where((ratio > 1 / _FACTOR) & (ratio < _FACTOR), ideal, scale).to(torch.float32)
        nearest = self.storage.round_scale(ideal.unsqueeze(1), self.rows, place).squeeze(1)
        beyond = self.storage.round_scale((2 * ideal - nearest).unsqueeze(1), self.rows, place).squeeze(1)
        best, new_scale, new_minimum = torch.zeros_like(gain), scale, minimum
        for tried in (scale, nearest, beyond):
            ds = (tried - scale).double()
            wanted = (minimum + (drop - ds * cross) / ones).to(torch.float32).clamp(min=self.least_minimum)
            stored = self.storage.round_minimum(wanted.unsqueeze(1), self.rows, place).squeeze(1)
            dm = (stored - minimum).double()
            change = ds * ds * uu + 2 * ds * dm * cross + dm * dm * ones - 2 * (ds * gain + dm * drop)
            better = (change < best) & (tried * scale > 0)
            better &= (ds.abs() + dm.abs()) > _LEAST * scale.abs()
            best = torch.where(better, change, best)
            new_scale, new_minimum = torch.where(better, tried, new_scale), torch.where(better, stored, new_minimum)
        moved = u * (new_scale - scale) - (new_minimum - minimum)
        if not bool((best < 0).any().item()):
            return False
        self.lanes.put(Steps(new_scale.unsqueeze(1), new_minimum.unsqueeze(1)), 1, scale.shape[0], 0, k)
        self._shift(p, q, a, b, slope, moved)
        return True

    def _shift(self, p: int, q: int, a: int, b: int, slope: Tensor, moved: Tensor) -> None:
        """The columns p to q of Q have moved by `moved` [q - p, rows]."""
        self.error[p:q] -= moved
        slope.addmm_(self.hessian[a:b, p:q], moved, alpha=-1.0)
