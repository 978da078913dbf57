"""What every Range answers: given the tiles of a tensor, which scale (and zero point) each tile should have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bitgrain.numerics.quotient import quotient

if TYPE_CHECKING:
    from bitgrain.numerics.spec import QuantSpec


class Range(ABC):
    """A way to choose limits. Subclasses are frozen dataclasses whose fields are the method's settings."""

    name: ClassVar[str] = ""
    fill: ClassVar[float] = 0.0
    """What stands beyond the edge in cut tiles: 0 cannot widen min-max limits; NaN for ranges that count elements."""

    @abstractmethod
    def limits(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Low and high limit of each tile, float32 [down, across].

        tiles       float32 [down, across, elements of a tile]; cut tiles are filled with `fill`
        spec        what the limits are for
        importance  non-negative weights of the elements, broadcastable to `tiles`; only for ranges that use it
        """

    def scale(self, tiles: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Ideal scale and real-valued zero point of each tile, before they are stored."""
        return scale_from_limits(*self.limits(tiles, spec, importance), spec)

    def __str__(self) -> str:
        settings = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({settings})" if settings else self.name


def scale_from_limits(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """The scale that maps [low, high] onto the spec's numbers, and the real zero point (None if symmetric).

    Symmetric: the smallest scale under which neither limit is clipped. For a restricted or float grid that is absmax /
    maximum; for full-range integers the negative side has one code more, so it is max(high / maximum, low / minimum).
    Asymmetric: [min(low, 0), max(high, 0)] is spread over the codes, so that 0 stays exactly representable
    (Jacob et al., arXiv 1712.05877, equation 1 and section 2.1).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        if spec.low >= 0:
            return quotient(high, spec.high), None
        return torch.maximum(quotient(high, spec.high), quotient(low, spec.low)), None
    scale = quotient(high - low, spec.high - spec.low)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, spec.low - low / safe
