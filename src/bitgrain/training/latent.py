"""FakeQuantizedWeight: a weight that is trained in full precision and used as its low-bit values.

    w -> s * (v - z)        v = round(clamp(w / s + z)), with the identity as the gradient of round

The latent weight w follows the straight-through gradient (arXiv 1308.3432), the scale s that of LSQ (arXiv 1902.08153,
equation 3), times 1 / sqrt(N high) for a tile of N elements (its section 2.2). Scale and zero point are rounded to
their storage each time, so what is trained is what will be written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor, fake_quantize, quantize
from bitgrain.numerics.affine import as_zero
from bitgrain.numerics.columns import Columns
from bitgrain.numerics.formats import E8M0, FloatFormat
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.quantize import replaced
from bitgrain.numerics.scales import round_scale

_INSIDE = 0.8
"""How far from its code, in parts of the way to the next code's cell, a latent weight may start. Codes that a solver
moved off the nearest one would otherwise lie at the edge of their cell, and the first small step would move them back.
"""


class FakeQuantizedWeight(nn.Module):
    """The low-bit view of one matrix, started from a QTensor; its input is the latent weight [out, in].

    scale  [down, across] float32, learned; its signs stay. None where scales are quantized themselves or powers of two:
           these stay as they are
    zero   [down, across] float32, learned, of real zero points; None otherwise: integer ones and minima stay
    Raises SchemeError for a QTensor with sparse outliers.
    """

    first: Tensor
    fixed_zero: Tensor | None
    column_index: Tensor | None
    column_values: Tensor | None

    def __init__(self, start: QTensor) -> None:
        super().__init__()
        if start.outliers is not None:
            raise SchemeError(f"{start.spec.describe()}: outliers were chosen for codes that training would change")
        self.spec, self.shape, self.start_scale = replace(start.spec, columns=None), start.shape, start.scale
        self._whole_spec = start.spec
        self.register_buffer("column_index", start.columns and start.columns.index)
        self.register_buffer("column_values", start.columns and start.columns.values)
        steps = scale_values(start.scale)
        learned = isinstance(start.scale, Tensor) and start.spec.scale != E8M0
        real = start.spec.zero_point == "real" and start.zero is not None
        self.register_buffer("first", steps.clone())
        self.start_minimum = start.minimum
        fixed = start.zero if start.minimum is None else scale_values(start.minimum)
        self.register_buffer("fixed_zero", None if real else fixed)
        self.scale = nn.Parameter(steps.clone()) if learned else None
        self.zero = nn.Parameter(start.zero.to(torch.float32, copy=True)) if real and start.zero is not None else None
        self._zero_dtype = start.zero.dtype if start.zero is not None else torch.float32
        elements = math.prod(start.spec.granularity.tile(start.shape))
        self._slope = 1 / math.sqrt(elements * max(1.0, start.spec.high))

    def forward(self, weight: Tensor) -> Tensor:
        """What `commit(weight)` dequantizes to, in the dtype of `weight`, differentiable."""
        dense = fake_quantize(weight, self.spec, scale=self.steps(), zero=self.zeros())
        return dense if self.columns is None else self.columns.put_into(dense)

    @property
    def columns(self) -> Columns | None:
        """Those that are kept in 16 bits: they are not trained."""
        if self.column_index is None or self.column_values is None:
            return None
        return Columns(self.column_index, self.column_values)

    def steps(self) -> Tensor:
        """The scales as stored, float32 [down, across]."""
        if self.scale is None:
            return self.first
        scale = slowed(self.scale, self._slope).abs() * torch.where(self.first < 0, -1.0, 1.0)
        assert isinstance(self.spec.scale, FloatFormat)
        with torch.no_grad():
            stored = round_scale(scale.clamp(-self.spec.scale.maximum, self.spec.scale.maximum), self.spec)
        return replaced(scale, stored)

    def zeros(self) -> Tensor | None:
        """The zero points as stored, [down, across]; None for symmetric formats."""
        if self.zero is None:
            return self.fixed_zero
        return replaced(self.zero, self.zero.detach().to(self._zero_dtype).to(torch.float32))

    @torch.no_grad()
    def commit(self, weight: Tensor) -> QTensor:
        """The QTensor of the latent `weight`."""
        scale, zero = self.start_scale, self.zeros()
        if isinstance(scale, Tensor) and self.scale is not None:
            scale = self.steps().to(scale.dtype)
        zero = zero if zero is None or self.zero is None else zero.to(self._zero_dtype)
        offset = zero if self.start_minimum is None else self.start_minimum
        found = quantize(weight, self.spec, scale=scale, zero=offset)
        return found if self.columns is None else replace(found, spec=self._whole_spec, columns=self.columns)


class FakeQuantizedParameter(nn.Module):
    """The view of a whole parameter, as a parametrization (`torch.nn.utils.parametrize`): one matrix, or a stack.

    parts       where its matrices start; transposed: each is stored [in, out]
    """

    def __init__(self, parts: Sequence[QTensor], transposed: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(FakeQuantizedWeight(part) for part in parts)
        self.transposed = transposed

    def forward(self, parameter: Tensor) -> Tensor:
        matrices = zip(self.parts, self.matrices(parameter), strict=True)
        return self.joined([part(matrix) for part, matrix in matrices], parameter)

    def joined(self, matrices: Sequence[Tensor], parameter: Tensor) -> Tensor:
        """The inverse of `matrices`: a tensor of the parameter's shape and dtype."""
        turned = [matrix.mT if self.transposed else matrix for matrix in matrices]
        whole = torch.stack(turned) if len(turned) > 1 else turned[0]
        return whole.reshape(parameter.shape).to(parameter.dtype)

    def matrices(self, parameter: Tensor) -> list[Tensor]:
        """The [out, in] matrices of the parameter, in the shapes of the parts."""
        rows, cols = cast(FakeQuantizedWeight, self.parts[0]).shape
        stored = (cols, rows) if self.transposed else (rows, cols)
        stack = parameter.reshape(len(self.parts), *stored)
        return [matrix.mT if self.transposed else matrix for matrix in stack]

    def commit(self, parameter: Tensor) -> list[QTensor]:
        """One QTensor for each matrix."""
        views = cast("list[FakeQuantizedWeight]", list(self.parts))
        return [view.commit(matrix) for view, matrix in zip(views, self.matrices(parameter), strict=True)]


@torch.no_grad()
def latent_weight(start: QTensor, weight: Tensor | None = None) -> Tensor:
    """Where training starts, float32 [out, in]: `weight` (what was rounded) moved into the cells of `start`'s codes.

    Without it, the dequantized values. Under the scales of `start` it rounds to the codes of `start`.
    """
    if weight is None:
        return start.dequantize()
    spec = start.spec
    tiles = to_tiles(weight.to(start.codes.device, torch.float32), spec.granularity)
    steps = scale_values(start.scale).unsqueeze(-1)
    steps = steps.masked_fill(steps == 0, 1.0)
    zero = start.zero if start.minimum is None else as_zero(scale_values(start.minimum), steps.squeeze(-1))
    offset = 0.0 if zero is None else zero.to(torch.float32).unsqueeze(-1)
    grid = spec.format.grid().to(tiles.device)
    grid = grid[grid >= spec.low]
    values = to_tiles(spec.format.decode(start.codes), spec.granularity)
    place = torch.bucketize(values.contiguous(), grid)
    gaps = torch.diff(grid)
    below = values - gaps[(place - 1).clamp(min=0)] * (0.5 * _INSIDE) * (place > 0)
    above = values + gaps[place.clamp(max=len(gaps) - 1)] * (0.5 * _INSIDE) * (place < len(gaps))
    v = tiles / steps + offset
    inside = v.clamp(spec.low, spec.high)
    own = spec.format.round(inside) == values
    near = torch.where(own, inside, torch.minimum(torch.maximum(v, below), above))
    latent = torch.where(own & (v == inside), tiles, (near - offset) * steps)
    return from_tiles(latent, spec.granularity, start.shape)


def slowed(value: Tensor, slope: float) -> Tensor:
    """`value`, its gradient times `slope`."""
    return cast(Tensor, _Slowed.apply(value, slope))


class _Slowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.slope, None
