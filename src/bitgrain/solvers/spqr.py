"""SpQR: the most sensitive weights stay in float16, beside small groups whose scales are quantized themselves.

Dettmers et al., arXiv 2306.03078, algorithm 1. What a weight costs is (w - q)^2 / [H^-1]_jj, the least that its
rounding does to the outputs after all others have made up for it; an outlier is a weight without which its group
would cost much less (leave-one-out). The others go through GPTQ, where outliers make no error; their values are what
the error feedback has made of them when their turn comes. Two-level scales are a spec whose `scale` is a spec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, per_group
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.leave_one_out import fill_gaps, find_outliers
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.quantize import check_finite
from bitgrain.solvers.base import Moments, Solution, register_solver, required
from bitgrain.solvers.descend import descend
from bitgrain.solvers.gptq import ORDERS, column_order
from bitgrain.solvers.linalg import check_hessian, inverse_factor
from bitgrain.solvers.rtn import round_without_tokens
from bitgrain.solvers.steps import Lanes, Steps
from bitgrain.solvers.storage import Storage

_LANES = 4096  # rows that are worked on together; fixed, so results never depend on the machine


@register_solver("spqr")
@dataclass(frozen=True)
class SpQR:
    """GPTQ around outliers; how many there are says the spec (`outliers`).

    damping  added to the diagonal of H, relative to its mean
    order    of the columns, as for GPTQ; algorithm 1 leaves it as it is ("none") and fits scales on updated weights
    block    columns that are updated together, for speed alone
    """

    damping: float = 0.01
    order: str = "act"
    block: int = 64
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise SchemeError(f"spqr: order is one of {', '.join(ORDERS)}, not {self.order!r}")
        if not (0 <= self.damping <= 1 and self.block >= 1):
            raise SchemeError(f"spqr: 0 <= damping <= 1 and block >= 1 are needed, not {self}")

    def solve(
        self,
        weight: Tensor,
        spec: QuantSpec,
        moments: Moments | None = None,
        *,
        outer_scale: Tensor | None = None,
        name: str = "weight",
    ) -> Solution:
        """See `Solver.solve`. Without tokens the weights are rounded to nearest, and a note says so.

        Figures: damping, and the share of the elements that are outliers.
        """
        moments = required(moments, "spqr", name)
        if moments.tokens == 0:
            return round_without_tokens(weight, spec, outer_scale=outer_scale, name=name)
        x = weight.to(torch.float32)
        check_finite(x, name)
        check_hessian(moments.hessian, x.shape[1], name)
        order = column_order(moments.importance, spec.granularity, self.order)
        upper, damped = inverse_factor(moments.hessian, self.damping, order=order, name=name)
        variance = torch.empty_like(upper[0])
        variance[order] = upper.square().sum(dim=0)  # the diagonal of H^-1 = U^T U
        plain, count = replace(spec, outliers=0.0), spec.count_outliers(tuple(x.shape))
        kept = find_outliers(x, plain, variance.reciprocal(), count)
        static = self.order == "act" or spec.granularity.cols is None
        loop = _Loop(x, plain, kept, moments.importance, order, upper.t().contiguous(), static, self.block, name)
        dense, exact = loop.run(outer_scale)
        figures = {"damping": damped.damping, "outliers": count / x.numel()}
        if not spec.outliers:
            return Solution(dense, "spqr", figures, damped.notes)
        values = (exact - dense.dequantize())[kept]
        return Solution(
            replace(dense, spec=spec, outliers=Outliers.of(kept, values, name)), "spqr", figures, damped.notes
        )


def spqr_weight(bits: int = 3, group: int = 16, outer: int = 16, outliers: float = 0.01) -> QuantSpec:
    """The spec of the paper: asymmetric groups of 16, scales in 3 bits in groups of 16 of them, 1 % outliers.

    The zero points are integers of as many bits as the weights.
    """
    inner = QuantSpec(IntFormat(3, is_signed=False), per_group(outer), zero_point="integer", scale=FP16)
    return QuantSpec(IntFormat(bits), per_group(group), zero_point="integer", scale=inner, outliers=outliers)


@dataclass(frozen=True)
class _Loop:
    """One matrix on its way through the columns."""

    weight: Tensor  # float32 [out, in]
    spec: QuantSpec
    kept: Tensor  # bool [out, in]
    importance: Tensor  # [in]
    order: Tensor  # [in]
    factor: Tensor  # U^T, float32 [in, in], in the order
    static: bool
    block: int
    name: str

    def run(self, outer_scale: Tensor | None) -> tuple[QTensor, Tensor]:
        """Codes, scales and zero points; and each weight (float32 [out, in]) as it was when its turn came."""
        rows = self.weight.shape[0]
        ideal, zero = self._fit(self.weight, self.kept, self.importance)
        storage = Storage.choose(self.weight, self.spec, ideal, zero, self.importance, outer_scale, self.name)
        steps = storage.round(ideal, zero)
        numbers, exact = torch.empty_like(self.weight), torch.empty_like(self.weight)
        tile_rows = self.spec.granularity.tile((rows, 1))[0]
        step = max(1, _LANES // tile_rows) * tile_rows
        for start in range(0, rows, step):
            self._rows(slice(start, min(start + step, rows)), tile_rows, steps, storage, numbers, exact)
        codes = self.spec.format.encode(numbers)
        return storage.pack(codes, steps), exact

    def _fit(self, weight: Tensor, kept: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """The range's ideal scales and zero points of some columns; what is kept does not count."""
        granularity, choice = self.spec.granularity, self.spec.range
        tiles = to_tiles(weight, granularity, choice.fill).masked_fill(to_tiles(kept, granularity), torch.nan)
        weights = to_tiles(importance.expand(weight.shape), granularity)
        return choice.scale(fill_gaps(tiles, choice.fill), self.spec, weights)

    def _rows(
        self, rows: slice, tile_rows: int, steps: Steps, storage: Storage, numbers: Tensor, exact: Tensor
    ) -> None:
        """Fills `numbers` and `exact`, and with scales that are fitted on the way `steps`, for whole rows of tiles."""
        count = rows.stop - rows.start
        width = self.spec.granularity.tile(tuple(self.weight.shape))[1]
        bands = slice(rows.start // tile_rows, -(-rows.stop // tile_rows))
        lanes = Lanes(self.spec, steps.scale.shape[1], count, self.weight.device)
        lanes.put(Steps(steps.scale[bands], None if steps.zero is None else steps.zero[bands]), tile_rows, count)
        columns = self.weight[rows][:, self.order].t().contiguous()
        kept = self.kept[rows][:, self.order].t().contiguous()

        def fit_tile(k: int, first: int, last: int) -> None:
            part = columns[first:last].t().contiguous()
            ideal, zero = self._fit(part, kept[first:last].t(), self.importance[self.order[first:last]])
            fitted = storage.round(ideal, zero, bands, slice(k, k + 1))
            lanes.put(fitted, tile_rows, count, 0, k)
            steps.scale[bands, k : k + 1] = fitted.scale
            if steps.zero is not None and fitted.zero is not None:
                steps.zero[bands, k : k + 1] = fitted.zero

        held = torch.empty_like(columns)
        tiles: list[int] = (self.order // width).tolist()
        found, _ = descend(
            columns, self.factor, tiles, lanes, self.block, None if self.static else fit_tile, kept=kept, exact=held
        )
        numbers[rows.start : rows.stop, self.order] = found.t()
        exact[rows.start : rows.stop, self.order] = held.t()
