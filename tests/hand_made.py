"""QTensors with minima and an order of their columns, made by hand: random codes, scales and minima."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group
from bitgrain.numerics.formats import FP16, FP32, FloatFormat, Format


def with_minima(bits: int, group: int, scale: Format | QuantSpec = FP16, **more: bool) -> QuantSpec:
    """x = s * v - m with unsigned codes; minima are stored as scales are."""
    return QuantSpec(
        get_format(f"uint{bits}"), per_group(group), zero_point="minimum", scale=scale, minimum=scale, **more
    )


def _inner(format: str, group: int = 16) -> QuantSpec:
    return QuantSpec(get_format(format), per_group(group), scale=FP16)


SPECS = {
    "Q4_1": with_minima(4, 32),
    "Q5_1": with_minima(5, 32),
    "MLX 8": with_minima(8, 64, get_format("bfloat16")),
    "MLX 3": with_minima(3, 64, FP32),
    "Q2_K": with_minima(2, 16, _inner("uint4")),
    "Q4_K": with_minima(4, 32, _inner("uint6", 8)),
    "Q5_K": with_minima(5, 32, _inner("uint6", 8)),
    "Q3_K": QuantSpec(get_format("int3"), per_group(16), scale=_inner("int6")),
    "Q6_K": QuantSpec(get_format("int6"), per_group(16), scale=_inner("int8")),
    "act-order": QuantSpec(get_format("int4"), per_group(32), scale=FP16, ordered=True),
    "act-order 3, asymmetric": QuantSpec(get_format("uint3"), per_group(64), zero_point="integer", ordered=True),
    "Q4_1 act-order": with_minima(4, 32, ordered=True),
}
"""The weights of llama.cpp, MLX and GPTQ that no preset has."""


def hand_made(spec: QuantSpec, rows: int, cols: int, seed: int = 0, size: float = 1.0) -> QTensor:
    """Some scales are 0, and some negative where the spec has a sign for it. Elements are of about `size`."""
    made = torch.Generator().manual_seed(seed)
    codes = _codes(spec.format, (rows, cols), made)
    tiles = spec.granularity.tiles((rows, cols))
    step = 2.0 * size / 2**spec.format.bits
    scale = _stored(spec.scale, tiles, made, step)
    minimum = None if spec.minimum is None else _stored(spec.minimum, tiles, made, size)
    zero = _codes(spec.format, tiles, made) if spec.zero_point == "integer" else None
    order = torch.randperm(cols, generator=made).to(torch.int32) if spec.ordered else None
    return QTensor(codes, scale, zero, spec, minimum=minimum, order=order)


def _stored(
    storage: Format | QuantSpec, shape: tuple[int, int], made: torch.Generator, size: float
) -> Tensor | QTensor:
    if isinstance(storage, QuantSpec):
        step = size / 2 ** (storage.format.bits - storage.format.signed)
        outer = torch.rand(storage.granularity.tiles(shape), generator=made) * step
        assert isinstance(storage.scale, FloatFormat)
        return QTensor(_codes(storage.format, shape, made), outer.to(storage.scale.torch_dtype), None, storage)
    assert isinstance(storage, FloatFormat)
    values = torch.rand(shape, generator=made) * size
    return values.masked_fill(torch.rand(shape, generator=made) < 0.1, 0.0).to(storage.torch_dtype)


def _codes(format: Format, shape: tuple[int, ...], made: torch.Generator) -> Tensor:
    plain = torch.randint(0, 2**format.bits, shape, generator=made) - format.code_offset
    return plain.to(format.code_dtype)
