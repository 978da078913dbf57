"""Whole columns of a matrix, one for each of a few input channels, that are kept in 16 bits beside its codes.

What a channel's column is kept for decides how channels are chosen: LLM.int8() (arXiv 2208.07339, section 3.2) takes
those in which the inputs have outliers, and multiplies them in 16 bits on both sides; AWQ's first experiment (arXiv
2306.00978, section 3.1, table 1) compares the channels with the largest inputs, those with the largest weights, and
channels drawn at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics.formats import BF16, FP16, Format

INDEX_DTYPE = torch.int32
By = Literal["activation", "weight", "random"]


@dataclass(frozen=True)
class ColumnChoice:
    """How many columns are kept, and which; part of a QuantSpec.

    share  of the columns, above 0 and at most 0.5: ceil(share * columns) are kept, so that every byte is known
           beforehand
    by     "activation": the channels whose inputs have the largest mean |x|, which only calibration can tell;
           "weight": the columns with the largest 2-norm; "random": any, the same for all matrices of one width
    seed   of "random"
    dtype  16-bit float in which they are stored: that of the checkpoint where it has one
    Raises SchemeError for anything else.
    """

    share: float
    by: By = "activation"
    seed: int = 0
    dtype: Format = FP16

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise SchemeError(f"columns kept in 16 bits are a share above 0 and at most 0.5, not {self.share:g}")
        if self.by not in ("activation", "weight", "random"):
            raise SchemeError(f"columns are chosen by activation, weight or random, not by {self.by!r}")
        if self.dtype not in (FP16, BF16):
            raise SchemeError(f"columns are kept in float16 or bfloat16, not {self.dtype}")

    @property
    def needs_inputs(self) -> bool:
        """Whether only calibration can tell which they are."""
        return self.by == "activation"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == BF16 else torch.float16

    def for_dtype(self, dtype: torch.dtype) -> ColumnChoice:
        """The same for a checkpoint in `dtype`: bfloat16 stays what it is, all else fits float16 better."""
        return replace(self, dtype=BF16 if dtype == torch.bfloat16 else FP16)

    def count(self, columns: int) -> int:
        """How many of `columns` are kept."""
        return max(1, math.ceil(round(self.share * columns, 6)))  # 0.07 * 100 is 7.000000000000001

    def count_bits(self, rows: int, columns: int) -> int:
        """Bits of a matrix's kept columns and their numbers."""
        return self.count(columns) * (16 * rows + 8 * INDEX_DTYPE.itemsize)

    def choose(self, weight: Tensor, magnitude: Tensor | None = None, name: str = "weight") -> Tensor:
        """Which columns of `weight` [rows, columns] are kept: int32, ascending. Of equal ones the first.

        magnitude  [columns]: mean |x| of each input channel. Raises SchemeError where it is needed and missing.
        """
        columns = weight.shape[1]
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            found = torch.randperm(columns, generator=generator).to(weight.device)
        elif self.by == "weight":
            size = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
            found = size.argsort(descending=True, stable=True)
        elif magnitude is None:
            raise SchemeError(
                f"{name}: which columns are kept by activation only calibration can tell; give it text, or choose by "
                "weight or random"
            )
        else:
            found = magnitude.to(weight.device).argsort(descending=True, stable=True)
        return found[: self.count(columns)].sort().values.to(INDEX_DTYPE)

    def describe(self) -> str:
        """For tables."""
        return f"{100 * self.share:g} % of the columns in {self.dtype} ({self.by})"


@dataclass(frozen=True)
class Columns:
    """The kept columns of a matrix [rows, columns].

    index   int32 [k], ascending; values: float16 or bfloat16 [rows, k]
    """

    index: Tensor
    values: Tensor

    @staticmethod
    def of(weight: Tensor, index: Tensor, dtype: torch.dtype, name: str = "weight") -> Columns:
        """Those of `weight` at `index`. Raises NumericsError for one that `dtype` cannot hold."""
        exact = weight.index_select(1, index)
        values = exact.to(dtype)
        beyond = int((~torch.isfinite(values)).sum().item())
        if beyond:
            raise NumericsError(
                f"{name}: {beyond} weights of its kept columns overflow {str(dtype).removeprefix('torch.')} (largest "
                f"{float(exact.abs().max()):.4g}); quantize it without kept columns"
            )
        return Columns(index, values)

    def put_into(self, matrix: Tensor) -> Tensor:
        """`matrix` [rows, columns] with these columns in their places."""
        return matrix.index_copy(1, self.index.to(torch.int64), self.values.to(matrix.dtype))

    def rows(self, start: int, stop: int) -> Columns:
        """Those of some rows."""
        return Columns(self.index, self.values[start:stop])

    def to(self, device: torch.device | str) -> Columns:
        """The same on another device."""
        return Columns(self.index.to(device), self.values.to(device))
