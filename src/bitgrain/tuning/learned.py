"""LearnedWeight: a quantized weight as a differentiable function of a few numbers that may be learned.

    w = s * (v - z)        v = round(clamp(u)), with the identity as the gradient of round

What can be learned, each on its own or together:
- codes   an offset in [-0.5, 0.5] for each element is added to u before rounding (SignRound, arXiv 2309.05516, equation
          3; AdaRound, arXiv 2004.10568, is the same search space for offsets around W / s). Integer formats. "free":
          without these limits, W itself is learned (straight-through, as ZeroQuant's distillation, arXiv 2206.01861).
- scales  "factor": s times a learned factor for each tile, the codes stay (EfficientQAT's second phase, arXiv
          2407.11062, section 3.3). "range": the tile's lower and upper limit times learned factors, from which scale
          and zero point follow and under which the weight is rounded anew (SignRound, equation 4).
- zeros   a shift of real zero points.

Scales and zero points are rounded to their storage in every evaluation, so what is trained is what will be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QTensor
from bitgrain.numerics.affine import as_zero
from bitgrain.numerics.formats import E8M0, FloatFormat
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import replaced, straight_through
from bitgrain.numerics.scales import round_scale

ScaleMode = Literal["kept", "factor", "range"]

# How far from its code a latent weight may start. Codes that another solver moved off the nearest one would otherwise
# all lie at the edge of their cell, and the first small step would move a good part of them back.
_INSIDE = 0.4
_FACTOR = (0.5, 2.0)  # a scale stays within these multiples of the one it started from


@dataclass(frozen=True)
class Learn:
    """What is learned of a weight: see the module's text. What a format does not offer is left as it is."""

    codes: bool = False
    scales: ScaleMode = "factor"
    zeros: bool = False
    free: bool = False

    def __post_init__(self) -> None:
        if self.scales not in ("kept", "factor", "range"):
            raise SchemeError(f"scales can be 'kept', 'factor' or 'range', not {self.scales!r}")


class LearnedWeight:
    """A view of one QTensor whose parameters start where `weight()` is that QTensor's dequantized value.

    offsets  [down, across, elements of a tile] or None: added before rounding, in steps of the grid
    scales   [down, across] or None: relative change of the upper limit ("range"), or ("factor") change of the scale by
             which the grid's end moves by so many steps, 2**(bits - 1) times the relative change: what a weight can be
             wrong by is a part of a step, so one learning rate suits all widths
    lows     [down, across] or None: relative change of the lower limit ("range" of asymmetric formats)
    shifts   [down, across] or None: added to real zero points
    All float32, zero at first, on the device of the codes.
    """

    def __init__(self, q: QTensor, learn: Learn, weight: Tensor | None = None) -> None:
        spec = q.spec
        self.start = q
        # beyond 8 bits float32 does not tell one code's cell from the next one's, and rounding hardly matters
        integer = isinstance(spec.format, IntFormat) and spec.format.bits <= 8
        mode: ScaleMode = learn.scales if isinstance(q.scale, Tensor) and spec.scale != E8M0 else "kept"
        if mode == "range" and (not integer or spec.minimum is not None):
            mode = "factor"
        self._mode: ScaleMode = mode
        self._free = learn.free
        self.unit = scale_unit(q) if mode == "factor" else 1.0
        self._steps = scale_values(q.scale)
        self._zero = None if q.zero is None else q.zero.to(torch.float32)
        self._minimum = None if q.minimum is None else scale_values(q.minimum)
        self._values = spec.format.decode(to_tiles(q.codes, spec.granularity))
        rounds = (learn.codes and integer) or mode == "range"
        self._latent = self._latent_of(weight) if rounds else None
        self.offsets = torch.zeros_like(self._values) if learn.codes and integer else None
        self.scales = None if mode == "kept" else torch.zeros_like(self._steps)
        self.lows = torch.zeros_like(self._steps) if mode == "range" and self._zero is not None else None
        learns_zeros = learn.zeros and spec.zero_point == "real" and mode != "range"
        self.shifts = torch.zeros_like(self._steps) if learns_zeros else None
        for tensor in self.parameters().values():
            tensor.requires_grad_(True)

    def parameters(self) -> dict[str, Tensor]:
        """What is learned, by name; empty where this format offers nothing of what was asked."""
        named = {"offsets": self.offsets, "scales": self.scales, "lows": self.lows, "shifts": self.shifts}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @torch.no_grad()
    def project_(self) -> None:
        """Bring the parameters back to where they are allowed: after each step of a descent."""
        if self.offsets is not None and not self._free:
            self.offsets.clamp_(-0.5, 0.5)
        for tensor in (self.scales, self.lows):
            if tensor is not None:
                tensor.clamp_((_FACTOR[0] - 1) / self.unit, (_FACTOR[1] - 1) / self.unit)

    def weight(self) -> Tensor:
        """float32 [out, in]: what the parameters stand for now, differentiable by all of them."""
        steps, zero = self._stored()
        values = self._grid(steps, zero)
        if zero is not None:
            values = values - zero.unsqueeze(-1)
        values = values * steps.unsqueeze(-1)
        if self._minimum is not None:
            values = values - self._minimum.unsqueeze(-1)
        dense = from_tiles(values, self.start.spec.granularity, self.start.shape)
        return dense if self.start.columns is None else self.start.columns.put_into(dense)

    @torch.no_grad()
    def commit(self) -> QTensor:
        """The QTensor whose dequantized value is `weight()`, bit for bit."""
        q, spec = self.start, self.start.spec
        steps, zero = self._stored()
        codes = q.codes
        if self._latent is not None:
            tiles = spec.format.encode(self._grid(steps, zero))
            codes = from_tiles(tiles, spec.granularity, q.shape).contiguous()
        scale = q.scale
        if self.scales is not None and isinstance(scale, Tensor):
            scale = steps.to(scale.dtype)
        stored = q.zero
        if stored is not None and zero is not None and (self.lows is not None or self.shifts is not None):
            stored = zero.to(stored.dtype)
        return QTensor(codes, scale, stored, spec, columns=q.columns, minimum=q.minimum)

    def _latent_of(self, weight: Tensor | None) -> Tensor:
        """The weight (tiles) clipped into the cell of each code: its rounding gives the start's codes."""
        spec, values = self.start.spec, self._values
        zero = self._zero if self._minimum is None else as_zero(self._minimum, self._steps)
        offset = torch.zeros_like(self._steps) if zero is None else zero
        steps, offset = _divisor(self._steps), offset.unsqueeze(-1)
        if weight is None:
            grid, tiles = values, (values - offset) * steps
        else:
            tiles = to_tiles(weight.to(values.device, torch.float32), spec.granularity)
            grid = tiles / steps + offset
        near = torch.minimum(torch.maximum(grid, values - _INSIDE), values + _INSIDE)
        own = spec.format.round(grid.clamp(spec.low, spec.high)) == values
        if self._mode == "range":  # in the weight's own units: a changed scale rounds it anew
            return torch.where(own, tiles, (near - offset) * steps)
        return torch.where(own, grid, near).clamp_(spec.low - _INSIDE, spec.high + _INSIDE)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as they would be written, float32, differentiable."""
        spec, steps, zero = self.start.spec, self._steps, self._zero
        if self.scales is None:
            return steps, self._shifted(zero)
        if self._mode == "factor" or zero is None:
            return self._round_scale(steps * (1 + self.unit * self.scales)), self._shifted(zero)
        assert self.lows is not None
        # the limits are (low - z) s and (high - z) s; written relative to s, nothing changes where nothing is learned
        span = spec.high - spec.low
        growth = self.scales * ((spec.high - zero) / span) + self.lows * ((zero - spec.low) / span)
        new = self._round_scale(steps * (1 + growth))
        ratio = steps / torch.where(new == 0, torch.ones_like(new), new)
        ratio = torch.where(steps == 0, torch.ones_like(ratio), ratio)
        moved = spec.low + (zero - spec.low) * (1 + self.lows) * ratio
        if spec.zero_point == "integer":
            return new, straight_through(spec.format, moved.clamp(spec.low, spec.high))
        return new, self._round_real(moved)

    def _shifted(self, zero: Tensor | None) -> Tensor | None:
        return zero if zero is None or self.shifts is None else self._round_real(zero + self.shifts)

    def _round_scale(self, scale: Tensor) -> Tensor:
        spec = self.start.spec
        assert isinstance(spec.scale, FloatFormat)
        with torch.no_grad():  # a stored scale may be negative: its sign is kept
            magnitude = scale.abs().clamp(max=spec.scale.maximum)
            rounded = round_scale(magnitude, spec) * torch.sign(scale)
        return replaced(scale, rounded)

    def _round_real(self, zero: Tensor) -> Tensor:
        assert self.start.zero is not None
        return replaced(zero, zero.detach().to(self.start.zero.dtype).to(torch.float32))

    def _grid(self, steps: Tensor, zero: Tensor | None) -> Tensor:
        """The numbers v of the format, as tiles."""
        if self._latent is None:
            return self._values
        spec, u = self.start.spec, self._latent
        if self._mode == "range":
            u = u / _divisor(steps)
            u = u if zero is None else u + zero.unsqueeze(-1)
        u = u if self.offsets is None else u + self.offsets
        return straight_through(spec.format, u.clamp(spec.low, spec.high))


def learned_weights(
    start: Mapping[str, QTensor], learn: Learn, weights: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, LearnedWeight]]:
    """The views of those QTensors of which something can be learned; the others are passed over.

    So are those with sparse outliers, which were chosen for the codes that they correct. A weight that is missing
    starts from the dequantized value.
    """
    for name, q in start.items():
        if q.outliers is not None:
            continue
        view = LearnedWeight(q, learn, None if weights is None else weights.get(name))
        if view.parameters():
            yield name, view


def scale_unit(q: QTensor) -> float:
    """2**(1 - bits): the relative change of a scale that moves the grid's end by about one step."""
    return 2.0 ** (1 - q.spec.format.bits)


def _divisor(steps: Tensor) -> Tensor:
    return steps.masked_fill(steps == 0, 1.0).unsqueeze(-1)
