"""Sparse outliers: a few numbers of a matrix that are kept in float16 beside its codes.

SpQR (arXiv 2306.03078, section 4.3) stores them like this too: row after row, the column and the number of each, and
where each row begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import NumericsError

VALUE_DTYPE = torch.float16
_SHORT = 2**15


def column_dtype(cols: int) -> torch.dtype:
    """The integers in which the columns of a matrix with `cols` columns are stored."""
    return torch.int16 if cols <= _SHORT else torch.int32


@dataclass(frozen=True)
class Outliers:
    """Numbers that are added to some elements of what the codes of a matrix [rows, cols] mean.

    starts   int32 [rows + 1]: the outliers of row r are those from starts[r] up to starts[r + 1]
    columns  int16 [k] (int32 if there are more than 32768 columns), ascending within a row
    values   float16 [k]
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(kept: Tensor, values: Tensor, name: str = "weight") -> Outliers:
        """Those at the places where `kept` (bool [rows, cols]) is true.

        values  float [k], row after row. Raises NumericsError for one that float16 cannot hold.
        """
        stored = values.to(VALUE_DTYPE)
        beyond = int((~torch.isfinite(stored)).sum().item())
        if beyond:
            raise NumericsError(f"{name}: {beyond} outliers overflow float16 (largest {float(values.abs().max()):.4g})")
        counts = kept.sum(dim=1, dtype=torch.int32)
        starts = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=kept.device)
        starts[1:] = counts.cumsum(0, dtype=torch.int32)
        columns = kept.nonzero()[:, 1].to(column_dtype(kept.shape[1]))
        return Outliers(starts, columns, stored)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each, int64 [k]."""
        rows = torch.arange(self.starts.shape[0] - 1, device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff().to(torch.int64)), self.columns.to(torch.int64)

    def add_to(self, matrix: Tensor) -> Tensor:
        """`matrix` (float32 [rows, cols]), in place, with the outliers added."""
        places = self.places
        matrix[places] += self.values.to(matrix.dtype)
        return matrix

    def rows(self, start: int, stop: int) -> Outliers:
        """Those of some rows."""
        first, last = int(self.starts[start].item()), int(self.starts[stop].item())
        starts = self.starts[start : stop + 1] - first
        return Outliers(starts, self.columns[first:last], self.values[first:last])

    def to(self, device: torch.device | str) -> Outliers:
        """The same on another device."""
        return Outliers(self.starts.to(device), self.columns.to(device), self.values.to(device))
