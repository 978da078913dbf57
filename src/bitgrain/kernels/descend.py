"""GPTQ's loop over the columns of a weight (native/solver/descend.h). Its twin: `solvers.descend.descend_in_torch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.memory import large_memory
from bitgrain.kernels.native import address_of, native

_PANEL = 48  # lanes, see native/solver/descend.h


class Descent:
    """Rows of a weight side by side, on their way through the columns.

    numbers  float32 [columns, lanes]: the weights; overwritten by the numbers of the grid that they become
    factor   F = U^T, float32 [columns, columns], lower triangular
    tiles    of each column, the row of the tables [.., lanes] of scales and zero points that is its own
    grid     see `kernels.grid`
    kept     bool [columns, lanes]: weights that shall stay as they are and make no error
    exact    float32 [columns, lanes]: filled with every weight as it was when its turn came
    loss     float64 [lanes]: the sum of the squared errors of the columns that have been rounded
    """

    def __init__(
        self,
        numbers: Tensor,
        factor: Tensor,
        tiles: Sequence[int],
        grid: Any,
        kept: Tensor | None = None,
        exact: Tensor | None = None,
    ) -> None:
        """Raises KernelError for tensors that are not contiguous, on the CPU, or of these shapes."""
        columns, lanes = numbers.shape
        rest = [one for one in (kept, exact) if one is not None]
        for tensor, shape in ((factor, (columns, columns)), *((one, (columns, lanes)) for one in (numbers, *rest))):
            if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise KernelError(f"GPTQ's loop needs {shape} in one piece on the CPU, not {tuple(tensor.shape)}")
        floats = [numbers, factor] if exact is None else [numbers, factor, exact]
        if any(one.dtype != torch.float32 for one in floats) or (kept is not None and kept.dtype != torch.bool):
            raise KernelError("GPTQ's loop needs weights and factor in float32, and what is kept as bool")
        if len(tiles) != columns:
            raise KernelError(f"GPTQ's loop needs a tile for each of {columns} columns")
        panels = -(-lanes // _PANEL)
        self.loss = torch.zeros(lanes, dtype=torch.float64)
        self._tiles = torch.tensor(tiles, dtype=torch.int32)
        self._panels = large_memory(4 * panels * columns * _PANEL)
        self._alive: list[Any] = [numbers, factor, kept, exact, grid]  # whose memory the loop works on
        self._lanes, self._rows = lanes, int(self._tiles.max()) + 1 if columns else 0
        self._job = native().Descent(
            columns, lanes, self._panels.data_ptr(), factor.data_ptr(), self._tiles.data_ptr(), grid,
            numbers.data_ptr(), self.loss.data_ptr(), address_of(kept), address_of(exact),
        )  # fmt: skip
        self._job.load(torch.get_num_threads())

    def set_tables(self, scale: Tensor, divisor: Tensor, zero: Tensor | None) -> None:
        """Scales and zero points from now on, float32 [.., lanes]; `divisor` are the scales with 1 for 0."""
        for table in (scale, divisor) if zero is None else (scale, divisor, zero):
            fits = table.shape[0] >= self._rows and table.shape[1] == self._lanes
            if not fits or table.dtype != torch.float32 or not table.is_contiguous():
                raise KernelError(f"tables of scales are float32 [{self._rows} or more, {self._lanes}] in one piece")
        self._tables = scale, divisor, zero
        self._job.set_tables(scale.data_ptr(), divisor.data_ptr(), address_of(zero))

    def update(self, first: int, last: int) -> None:
        """Columns [first, last) of `numbers` become the weights after the errors of all columns before `first`."""
        self._job.update(first, last, torch.get_num_threads())

    def round(self, first: int, last: int, updated: bool = False) -> None:
        """Rounds columns [first, last), all columns before them being done; `updated`: `update` was called for them."""
        self._job.round(first, last, first if updated else 0, torch.get_num_threads())
