"""The same numbers under another spec: what a conversion between layouts does with each quantized matrix.

Nothing is rounded. Codes move to a format that has their numbers, scales and zero points to a storage that has theirs,
tiles are split, or joined where their scales are equal; and in the end both are dequantized and compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.formats import Format, IntFormat
from bitgrain.numerics.granularity import Granularity
from bitgrain.numerics.packed import float_dtype
from bitgrain.numerics.qtensor import QTensor, scale_values
from bitgrain.numerics.quantize import quantize, store_scale
from bitgrain.numerics.spec import QuantSpec


def respell(q: QTensor, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> QTensor:
    """`q` [out, in] as a QTensor of `spec` that dequantizes to the same numbers in `dtype` (-0 counts as 0).

    Raises SchemeError that says which numbers `spec` cannot hold.
    """
    if spec.outliers != q.spec.outliers or spec.columns != q.spec.columns:
        raise SchemeError("outliers and columns in 16 bits stay what they are")
    order, codes = q.order, q.codes
    if order is not None and spec.granularity.cols is None:  # rows that share one scale may lie in any order
        codes, order = torch.empty_like(codes).index_copy_(1, order.to(torch.int64), codes), None
    if spec.ordered and order is None:
        order = torch.arange(q.shape[1], dtype=torch.int32, device=q.codes.device)
    elif not spec.ordered and order is not None:
        if not torch.equal(order, torch.arange(q.shape[1], dtype=order.dtype, device=order.device)):
            raise SchemeError("the columns have an order of their own (act-order)")
        order = None
    shape = (q.shape[0], q.shape[1])

    def retiled(tiles: Tensor, what: str) -> Tensor:
        return _retile(tiles, q.spec.granularity, spec.granularity, shape, what)

    steps = retiled(scale_values(q.scale), "scales")
    scale = _same_storage(q.scale, q.spec, spec) if steps.shape == scale_values(q.scale).shape else None
    scale = _store(steps, spec.scale, spec, "scales") if scale is None else scale
    zero = None if q.zero is None else retiled(q.zero.to(torch.float32), "zero points")
    lows = None if q.minimum is None else retiled(scale_values(q.minimum), "minima")
    stored_zero, minimum, shift = _offsets(zero, lows, steps, q, spec)
    codes = _recode(codes, q.spec.format, spec.format, shift)
    found = QTensor(codes, scale, stored_zero, spec, q.outliers, q.columns, minimum, order)
    if not torch.equal(found.dequantize(dtype), q.dequantize(dtype)):
        raise SchemeError(f"{spec.describe()} rounds these numbers differently in {dtype}")
    return found


def _retile(tiles: Tensor, old: Granularity, new: Granularity, shape: tuple[int, int], what: str) -> Tensor:
    """One number for each tile of `new`, out of one for each of `old`."""
    for axis in (0, 1):
        have, want = old.tile(shape)[axis], new.tile(shape)[axis]
        if have == want:
            continue
        if have % want == 0:
            tiles = tiles.repeat_interleave(have // want, dim=axis)
            tiles = tiles.narrow(axis, 0, -(-shape[axis] // want))
        elif want % have == 0 or want == shape[axis]:
            groups = tiles.split(max(1, want // have), dim=axis)
            if any(not torch.equal(group, group.narrow(axis, 0, 1).expand_as(group)) for group in groups):
                raise SchemeError(f"{what} differ inside the tiles of {new}")
            tiles = torch.cat([group.narrow(axis, 0, 1) for group in groups], dim=axis)
        else:
            raise SchemeError(f"the tiles of {new} and of {old} cross")
    return tiles.contiguous()


def _same_storage(stored: Tensor | QTensor, old: QuantSpec, new: QuantSpec) -> Tensor | QTensor | None:
    """The scales as they are, where the storage is the same."""
    return stored if old.scale == new.scale else None


def _store(values: Tensor, storage: Format | QuantSpec, spec: QuantSpec, what: str) -> Tensor | QTensor:
    """float32 [down, across] in a storage that holds them exactly."""
    if isinstance(storage, QuantSpec):
        nested = store_scale(values, spec, what) if storage is spec.scale else quantize(values, storage, name=what)
        if not torch.equal(scale_values(nested), values):
            raise SchemeError(f"{what} are not products of {storage.describe()}")
        return nested
    stored = values.to(float_dtype(storage))
    if not torch.equal(scale_values(stored), values):
        raise SchemeError(f"{what} are not all numbers of {storage}")
    return stored


def _offsets(
    zero: Tensor | None, lows: Tensor | None, steps: Tensor, q: QTensor, spec: QuantSpec
) -> tuple[Tensor | None, Tensor | QTensor | None, int]:
    """Zero points and minima as `spec` stores them, and by how much every code's number grows."""
    integers = isinstance(spec.format, IntFormat) and isinstance(q.spec.format, IntFormat)
    shift = int(spec.format.minimum - q.spec.format.minimum) if integers else 0
    if spec.zero_point == "minimum":
        assert spec.minimum is not None
        if (
            q.minimum is not None
            and not shift
            and (q.spec.minimum, q.spec.granularity)
            == (
                spec.minimum,
                spec.granularity,
            )
        ):
            return None, q.minimum, 0
        if lows is None:
            lows = steps * (torch.zeros_like(steps) if zero is None else zero).add(shift)
        else:
            lows = lows + steps * shift
        return None, _store(lows, spec.minimum, spec, "minima"), shift
    if lows is not None:
        zero = torch.where(lows == 0, torch.zeros_like(lows), lows / steps)
        if not torch.equal(zero * steps, lows):
            raise SchemeError("minima are not multiples of the scales")
    if spec.zero_point == "real":
        zero = torch.zeros_like(steps) if zero is None else zero
        return zero.to(float_dtype(spec.scale_format)), None, 0
    if spec.zero_point == "none":
        if zero is None:
            return None, None, 0
        first = float(zero.flatten()[0])
        if bool((zero != first).any().item()) or first != int(first):
            raise SchemeError("there are zero points, which a symmetric layer has none of")
        return None, None, -int(first)
    zero = (torch.zeros_like(steps) if zero is None else zero) + shift
    if not torch.equal(zero.round().clamp(spec.format.minimum, spec.format.maximum), zero):
        raise SchemeError(f"zero points are not all numbers of {spec.format}")
    return spec.format.encode(zero), None, shift


def _recode(codes: Tensor, old: Format, new: Format, shift: int) -> Tensor:
    if old == new and not shift:
        return codes
    values = old.decode(codes) + shift
    found = new.encode(new.round(values))
    if not torch.equal(new.decode(found), values):
        raise SchemeError(f"{new} does not have all numbers of {old}")
    return found
