"""The same numbers under another spec: what a conversion between layouts does with each quantized matrix.

Nothing is rounded. Codes move to a format that has their numbers, scales and zero points to a storage that has theirs,
tiles are split, or joined where their scales are equal. A number is s * (v - z), or s * v - m, in float32: with the
same s and the same v - z it is the same, and no codes need to be looked at. What is not seen from scales and zero
points alone is dequantized both ways and compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics.formats import Format, IntFormat
from bitgrain.numerics.granularity import Granularity
from bitgrain.numerics.packed import PackedMatrix, float_dtype, zero_dtype
from bitgrain.numerics.qtensor import QTensor, scale_values
from bitgrain.numerics.quantize import quantize, store_scale
from bitgrain.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Respelling:
    """A matrix under `spec`, its codes apart.

    shift   by how much every code's number grows
    undone  the order in which the codes lie until now, where they shall lie in none
    proven  whether every number is the same, whatever the codes
    stays   whether the unsigned codes are the same, so that they can be left packed
    """

    spec: QuantSpec
    scale: Tensor | QTensor
    zero: Tensor | None
    minimum: Tensor | QTensor | None
    order: Tensor | None
    shift: int
    undone: Tensor | None
    proven: bool
    stays: bool


def respell(q: QTensor, spec: QuantSpec, dtype: torch.dtype = torch.float32, *, compared: bool = False) -> QTensor:
    """`q` [out, in] as a QTensor of `spec` that dequantizes to the same numbers in `dtype` (-0 counts as 0).

    compared  it is known already that it does
    Raises SchemeError that says which numbers `spec` cannot hold.
    """
    how = plan_respelling(q, spec)
    codes = q.codes
    if how.undone is not None:
        codes = torch.empty_like(codes).index_copy_(1, how.undone.to(torch.int64), codes)
    codes = _recode(codes, q.spec.format, spec.format, how.shift)
    found = QTensor(codes, how.scale, how.zero, spec, q.outliers, q.columns, how.minimum, how.order)
    if not (how.proven or compared or torch.equal(found.dequantize(dtype), q.dequantize(dtype))):
        raise SchemeError(f"{spec.describe()} rounds these numbers differently in {dtype}")
    return found


def respell_packed(
    packed: PackedMatrix, spec: QuantSpec, dtype: torch.dtype = torch.float32, *, compared: bool = False
) -> PackedMatrix:
    """The same of codes that are packed, and stay so where they are the same."""
    how = plan_respelling(packed, spec)
    if not how.stays or not (how.proven or compared):
        return PackedMatrix.of(respell(packed.unpack(), spec, dtype, compared=compared))
    more = (packed.outliers, packed.columns, how.minimum, how.order)
    return PackedMatrix(packed.words, how.scale, how.zero, spec, packed.shape, *more)


def plan_respelling(q: QTensor | PackedMatrix, spec: QuantSpec) -> Respelling:
    """How `q` [out, in] is said under `spec`, without a look at its codes. Raises SchemeError where scales, zero
    points, minima or the order cannot be."""
    if spec.outliers != q.spec.outliers or spec.columns != q.spec.columns:
        raise SchemeError("outliers and columns in 16 bits stay what they are")
    rows, cols = q.shape
    order, undone = q.order, None
    if order is not None and spec.granularity.cols is None:  # rows that share one scale may lie in any order
        order, undone = None, order
    if spec.ordered and order is None:
        order = torch.arange(cols, dtype=torch.int32, device=_device(q))
    elif not spec.ordered and order is not None:
        if not torch.equal(order, torch.arange(cols, dtype=order.dtype, device=order.device)):
            raise SchemeError("the columns have an order of their own (act-order)")
        order = None

    def retiled(tiles: Tensor, what: str) -> Tensor:
        return _retile(tiles, q.spec.granularity, spec.granularity, (rows, cols), what)

    values = scale_values(q.scale)
    steps = retiled(values, "scales")
    same = q.spec.scale == spec.scale and steps.shape == values.shape
    scale = q.scale if same else _store(steps, spec.scale, spec, "scales")
    zero = None if q.zero is None else retiled(q.zero.to(torch.float32), "zero points")
    lows = None if q.minimum is None else retiled(scale_values(q.minimum), "minima")
    stored_zero, minimum, shift, proven = _offsets(zero, lows, steps, q, spec)
    old, new = q.spec.format, spec.format
    integers = isinstance(old, IntFormat) and isinstance(new, IntFormat)
    stays = (old == new and not shift) or (
        integers and old.bits == new.bits and shift == old.code_offset - new.code_offset
    )
    return Respelling(
        spec=spec,
        scale=scale,
        zero=stored_zero,
        minimum=minimum,
        order=order,
        shift=shift,
        undone=undone,
        proven=proven and _holds_all(old, new, shift),
        stays=stays and undone is None,
    )


def _device(q: QTensor | PackedMatrix) -> torch.device:
    return q.codes.device if isinstance(q, QTensor) else q.words.device


def _retile(tiles: Tensor, old: Granularity, new: Granularity, shape: tuple[int, int], what: str) -> Tensor:
    """One number for each tile of `new`, out of one for each of `old`."""
    for axis in (0, 1):
        have, want = old.tile(shape)[axis], new.tile(shape)[axis]
        if have == want:
            continue
        if have % want == 0:
            across = [-1, -1]
            across.insert(axis + 1, have // want)
            tiles = tiles.unsqueeze(axis + 1).expand(across).flatten(axis, axis + 1)
            tiles = tiles.narrow(axis, 0, -(-shape[axis] // want))
        elif want % have == 0 or want == shape[axis]:
            groups = tiles.split(want // have if want % have == 0 else tiles.shape[axis], dim=axis)
            if any(not torch.equal(group, group.narrow(axis, 0, 1).expand_as(group)) for group in groups):
                raise SchemeError(f"{what} differ inside the tiles of {new}")
            tiles = torch.cat([group.narrow(axis, 0, 1) for group in groups], dim=axis)
        else:
            raise SchemeError(f"the tiles of {new} and of {old} cross")
    return tiles.contiguous()


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
    zero: Tensor | None, lows: Tensor | None, steps: Tensor, q: QTensor | PackedMatrix, spec: QuantSpec
) -> tuple[Tensor | None, Tensor | QTensor | None, int, bool]:
    """Zero points and minima as `spec` stores them, by how much every code's number grows, and whether the numbers are
    the same if the codes' are."""
    integers = isinstance(spec.format, IntFormat) and isinstance(q.spec.format, IntFormat)
    shift = int(spec.format.minimum - q.spec.format.minimum) if integers else 0
    bits = max(spec.format.bits, q.spec.format.bits) + 1
    if spec.zero_point == "minimum":
        assert spec.minimum is not None
        if lows is None:
            plain = zero is None and not shift  # s * v - 0
            zero = torch.zeros_like(steps) if zero is None else zero
            proven = plain or (integers and q.spec.zero_point != "real" and _exact_products(steps, bits))
            return None, _store(steps * zero.add(shift), spec.minimum, spec, "minima"), shift, proven
        if shift:
            return None, _store(lows + steps * shift, spec.minimum, spec, "minima"), shift, False
        same = (q.spec.minimum, q.spec.granularity) == (spec.minimum, spec.granularity)
        return None, q.minimum if same else _store(lows, spec.minimum, spec, "minima"), 0, True
    proven = True
    if lows is not None:
        zero = torch.where(lows == 0, torch.zeros_like(lows), lows / steps)
        if not torch.equal(zero * steps, lows):
            raise SchemeError("minima are not multiples of the scales")
        proven = integers and _exact_products(steps, bits)
    if spec.zero_point == "real":
        zero = torch.zeros_like(steps) if zero is None else zero
        stored = zero.to(zero_dtype(spec))
        return stored, None, 0, lows is None and torch.equal(stored.to(torch.float32), zero)
    if spec.zero_point == "none":
        if zero is None:
            return None, None, 0, True
        first = float(zero.flatten()[0])
        if bool((zero != first).any().item()) or first != int(first):
            raise SchemeError("there are zero points, which a symmetric layer has none of")
        return None, None, -int(first), proven
    zero = (torch.zeros_like(steps) if zero is None else zero) + shift
    if not torch.equal(zero.round().clamp(spec.format.minimum, spec.format.maximum), zero):
        raise SchemeError(f"zero points are not all numbers of {spec.format}")
    return spec.format.encode(zero), None, shift, proven


def _exact_products(steps: Tensor, bits: int) -> bool:
    """Whether the product of each scale and every integer of up to 2**bits is a float32, so that s * v - m with
    m = s * z is s * (v - z): the scales end in as many zeros, and are not too large."""
    ends = steps.contiguous().view(torch.int32) & (2**bits - 1)
    return not bool(ends.any().item()) and bool((steps * 2**bits).isfinite().all().item())


def _holds_all(old: Format, new: Format, shift: int) -> bool:
    """Whether `new` has all numbers of `old`, moved by `shift`; False where only the codes can tell."""
    if old == new and not shift:
        return True
    if not (isinstance(old, IntFormat) and isinstance(new, IntFormat)):
        return False
    return old.minimum + shift >= new.minimum and old.maximum + shift <= new.maximum


def _recode(codes: Tensor, old: Format, new: Format, shift: int) -> Tensor:
    if old == new and not shift:
        return codes
    if isinstance(old, IntFormat) and isinstance(new, IntFormat):
        if not _holds_all(old, new, shift) and codes.numel():
            low, high = (int(end.item()) + shift for end in codes.aminmax())
            if low < new.minimum or high > new.maximum:
                raise SchemeError(f"{new} does not have all numbers of {old}")
        if max(old.bits, new.bits) <= 8:  # two's complement: sums modulo 256 are right
            return (codes.view(torch.uint8) + shift % 256).view(new.code_dtype)
        return (codes.to(torch.int32) + shift).to(new.code_dtype)
    values = old.decode(codes) + shift
    found = new.encode(new.round(values))
    if not torch.equal(new.decode(found), values):
        raise SchemeError(f"{new} does not have all numbers of {old}")
    return found
