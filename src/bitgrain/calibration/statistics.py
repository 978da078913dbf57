"""Statistics of the inputs of one linear layer, summed over calibration tokens.

The Hessian H = sum of x x^T is what every solver needs: the output error of any candidate weight is tr(dW H dW^T).

Exactness. Tokens are gathered to pieces of `PIECE` and each piece is added as one product in float32, so the cuts
between batches leave no trace: any split of the same tokens in the same order gives the same bits. Sums that were taken
apart and merged differ only in the order of float32 additions: by at most `TOLERANCE` x sqrt(H_ii H_jj). The native
kernel gives the same bits for any number of threads; torch, where it multiplies, may not: one thread an operation
avoids it. Other instruction sets may round the last bits of a sum otherwise (docs/decisions/0023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.kernels.gram import add_gram, mirror
from bitgrain.numerics.observers import State, from_batches, start, update
from bitgrain.numerics.observers import merge as merge_states
from bitgrain.numerics.ranges import Percentile, Range
from bitgrain.solvers.base import Moments

__all__ = ["PIECE", "TOLERANCE", "Accumulator", "LayerStatistics", "layer_key", "merge", "whole_key"]

PIECE = 512
"""Tokens that are multiplied at once."""
TOLERANCE = 1e-5
"""Of merged Hessians: largest difference of an element, relative to the root of the product of its two diagonals."""

_HISTOGRAM = Percentile()
"""Any range that keeps a histogram; which one does not matter while counting."""


def layer_key(parameter: str, expert: int | None = None) -> str:
    """The name under which a layer's statistics are kept: its parameter in memory, and its place in a stack."""
    return parameter if expert is None else f"{parameter}[{expert}]"


def whole_key(key: str) -> str:
    """Under which what all tokens of its layer would show an expert is kept, beside what it saw, at `key`."""
    return f"{key}#whole"


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration leaves behind for one linear layer. Tensors are float32 unless said otherwise.

    tokens     how many were seen; 0 for an expert that none was routed to
    hessian    [in, in]: mean of x x^T, exactly symmetric; None if it was not asked for
    mean_abs   [in]: mean of |x|
    low, high  [in]: smallest and largest x; 0 where nothing was seen
    ends       [batches, 2]: smallest and largest element of every window (or batch), in order
    counts, exponent  the histogram, see `numerics.observers.State`; None without one
    rows        [some, in]: tokens drawn from all, for what needs the inputs themselves; None: none were kept
    """

    tokens: int
    hessian: Tensor | None
    mean_abs: Tensor
    low: Tensor
    high: Tensor
    ends: Tensor
    counts: Tensor | None = None
    exponent: int = -1000
    rows: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.mean_abs.numel()

    @property
    def absmax(self) -> Tensor:
        """[in]: largest |x|."""
        return torch.maximum(-self.low, self.high)

    @property
    def moments(self) -> Moments:
        """As solvers take them. Raises ValueError without a Hessian, which is the caller's mistake."""
        if self.hessian is None:
            raise ValueError("these statistics were taken without a Hessian")
        return Moments(self.hessian, self.tokens)

    def observed(self, range: Range) -> State:
        """The observer's state for static input scales by `range`. Raises SchemeError if it needs a histogram that
        was not taken."""
        return from_batches(range, self.ends, self.tokens * self.in_features, self.counts, self.exponent)


class Accumulator:
    """Sums over the inputs of one layer (or of several that read the same input). Give it batches, then `finish`.

    name       for errors
    hessian    whether to sum x x^T: float32 [in, in], all that costs memory and time
    histogram  whether to count a histogram, for static input scales by percentile, mse or kl
    device     where the sums live; None: where the first batch is
    """

    def __init__(
        self,
        in_features: int,
        name: str,
        *,
        hessian: bool = True,
        histogram: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.in_features = name, in_features
        self.tokens = 0
        self._wants_hessian, self._device = hessian, device
        self._sums: _Sums | None = None
        self._waiting: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._state: State | None = start(_HISTOGRAM) if histogram else None

    def update(self, x: Tensor) -> None:
        """Add x [tokens, in] or [windows, tokens, in], any float dtype.

        Raises NumericsError that names the layer for NaN and Inf.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.in_features:
            raise ValueError(f"inputs of {self.name} have the shape {tuple(x.shape)}, not [.., {self.in_features}]")
        if x.numel() == 0:
            return
        # bfloat16 stays: its products are exact, and faster
        x = x.detach().to(self._device or x.device, x.dtype if x.dtype == torch.bfloat16 else torch.float32)
        flat = x.reshape(1, -1) if x.ndim == 2 else x.flatten(1)
        ends = torch.stack([flat.amin(-1), flat.amax(-1)], dim=-1).to(torch.float32)
        if not bool(torch.isfinite(ends).all()):
            raise NumericsError(_not_finite(x, self.name))
        self._ends.append(ends)
        rows = x.reshape(-1, self.in_features)
        self.tokens += rows.shape[0]
        self._gather(rows)

    def finish(self) -> LayerStatistics:
        """What was seen. The accumulator is spent: its memory goes into the result."""
        self._flush()
        sums, count = self._sums or self._empty(), max(1, self.tokens)
        hessian = sums.hessian
        if hessian is not None:
            mirror(hessian.div_(count))
        self._sums = None
        state = self._state
        return LayerStatistics(
            tokens=self.tokens,
            hessian=hessian,
            mean_abs=(sums.absolute / count).to(torch.float32),
            low=sums.low,
            high=sums.high,
            ends=torch.cat(self._ends) if self._ends else sums.low.new_empty(0, 2),
            counts=None if state is None else state.counts,
            exponent=-1000 if state is None else state.exponent,
        )

    def absorb(self, other: Accumulator) -> None:
        """Add what `other` has seen, as if after all that this one has; `other` is spent. See `merge`."""
        if (other.in_features, other._wants_hessian, other._state is None) != (
            *(self.in_features, self._wants_hessian),
            self._state is None,
        ):
            raise ValueError(f"{self.name} and {other.name} cannot be merged: they do not keep the same sums")
        self._flush()
        other._flush()
        self.tokens += other.tokens
        self._ends += [ends.to(self._ends[0].device) if self._ends else ends for ends in other._ends]
        if self._state is not None and other._state is not None:
            self._state = merge_states(self._state, other._state)
        if self._sums is None or other._sums is None:
            self._sums = self._sums or other._sums
        else:
            self._sums.add(other._sums)
        other._sums = None

    def _gather(self, rows: Tensor) -> None:
        """Hand pieces of exactly PIECE tokens on; keep the rest."""
        waiting = sum(part.shape[0] for part in self._waiting)
        if waiting:
            head = rows[: PIECE - waiting]
            self._waiting.append(head.clone())  # the caller may write over its batch
            if waiting + head.shape[0] < PIECE:
                return
            self._add(torch.cat(self._waiting))
            self._waiting, rows = [], rows[head.shape[0] :]
        whole = rows.shape[0] // PIECE * PIECE
        for piece in rows[:whole].split(PIECE) if whole else ():
            self._add(piece)
        if whole < rows.shape[0]:
            self._waiting.append(rows[whole:].clone())

    def _flush(self) -> None:
        if self._waiting:
            self._add(torch.cat(self._waiting))
            self._waiting = []

    def _add(self, piece: Tensor) -> None:
        if self._sums is None:
            self._sums = self._empty(piece.device)
        if self._sums.hessian is not None:
            add_gram(self._sums.hessian, piece)
        piece = piece.to(torch.float32)
        if self._state is not None:
            self._state = update(self._state, piece, self.name)
        self._sums.count(piece)

    def _empty(self, device: torch.device | None = None) -> _Sums:
        device, n = device or self._device, self.in_features
        low, high = torch.zeros(2, n, device=device)
        hessian = torch.zeros(n, n, device=device) if self._wants_hessian else None
        return _Sums(hessian, torch.zeros(n, dtype=torch.float64, device=device), low, high)


def merge(a: Accumulator, b: Accumulator) -> Accumulator:
    """Both together, b after a; both are spent. The order matters for the last bits and for moving averages, so
    parallel workers must be merged in the order of their windows."""
    a.absorb(b)
    return a


@dataclass
class _Sums:
    hessian: Tensor | None  # the upper triangle, see `kernels.gram`
    absolute: Tensor
    low: Tensor
    high: Tensor
    empty: bool = True

    def count(self, piece: Tensor) -> None:
        """Add x [tokens, in] float32, to all but the Hessian."""
        self._join(piece.abs().sum(0).double(), piece.amin(0), piece.amax(0))

    def add(self, other: _Sums) -> None:
        if self.hessian is not None and other.hessian is not None:
            self.hessian.add_(other.hessian.to(self.hessian.device))
        where = self.low.device
        self._join(other.absolute.to(where), other.low.to(where), other.high.to(where))

    def _join(self, absolute: Tensor, low: Tensor, high: Tensor) -> None:
        self.absolute = self.absolute + absolute
        self.low = low if self.empty else torch.minimum(self.low, low)
        self.high = high if self.empty else torch.maximum(self.high, high)
        self.empty = False


def _not_finite(x: Tensor, name: str) -> str:
    nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    return (
        f"the inputs of {name} hold {nan} NaN and {inf} Inf among {x.numel()} elements: the model overflows on the "
        "calibration text; calibrate in float32 or bfloat16, and check the checkpoint"
    )
