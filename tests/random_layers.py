"""Layers as people and other engines quantize them, drawn at random, with random codes and scales."""

from __future__ import annotations

import random
from typing import Any

import torch

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import Granularity, IntFormat, QTensor, QuantSpec, get_format, per_channel, quantize
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.packed import float_dtype, scale_dtype
from bitgrain.numerics.spec import bnb_4bit, mxfp4, nf4_double_quantized, nvfp4
from bitgrain.recipes import PRESETS, Scheme

_NESTED = [mxfp4(), nvfp4(), nf4_double_quantized(), bnb_4bit(), bnb_4bit("bnb_fp4"), bnb_4bit("bnb_fp4", double=False)]
DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


def random_spec(rng: random.Random, cols: int, storage: Any) -> QuantSpec:
    """What people quantize weights to, and what other engines do."""
    kind = rng.randrange(14)
    if kind < len(_NESTED):
        return _NESTED[kind]
    groups = [g for g in (16, 32, 64, 128) if cols % g == 0]
    granularity = Granularity(1, rng.choice([*groups, *groups, None]))
    if kind == 6:
        format = rng.choice(["nf4", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "ternary", "binary"])
        return QuantSpec(get_format(format), granularity, scale=storage)
    if kind == 7:
        return QuantSpec(IntFormat(8), per_channel(), restricted=True, scale=storage)
    bits = rng.choice([2, 3, 4, 4, 4, 5, 6, 8, 8])
    format = get_format(f"{rng.choice(['int', 'int', 'uint'])}{bits}")
    zero = rng.choice(["none", "integer", "integer", "minimum", "real"])
    ordered = granularity.cols is not None and rng.random() < 0.15
    minimum = storage if zero == "minimum" else None
    return QuantSpec(format, granularity, zero_point=zero, scale=storage, minimum=minimum, ordered=ordered)


def random_matrix(rng: random.Random, layer: StoredLayer) -> QTensor:
    """Random codes, scales, zero points and order; now and then such as fit another layout as well."""
    spec, generator = layer.scheme.weight, torch.Generator().manual_seed(rng.randrange(2**31))
    if spec in _NESTED:
        return quantize(torch.randn(layer.shape, generator=generator) * 0.1, spec)
    tiles = spec.granularity.tiles(layer.shape)
    first, easy = -spec.format.code_offset, rng.random() < 0.5
    if isinstance(spec.format, IntFormat):
        codes = torch.randint(first + spec.restricted, first + 2**spec.format.bits, layer.shape, generator=generator)
        codes = codes.to(spec.format.code_dtype)
    else:
        grid = spec.format.grid()
        codes = spec.format.encode(grid[torch.randint(0, len(grid), layer.shape, generator=generator)])

    scale = torch.rand(tiles, generator=generator) * 0.1 + 1e-3
    scale = torch.exp2(torch.log2(scale).floor()) if easy else scale
    scale = scale.to(scale_dtype(spec))
    zero = minimum = None
    if spec.zero_point == "integer":
        middle = first + 2 ** (spec.format.bits - 1)
        zero = torch.randint(first, first + 2**spec.format.bits, tiles, generator=generator)
        zero = (torch.full_like(zero, middle) if easy and rng.random() < 0.5 else zero).to(spec.format.code_dtype)
    elif spec.zero_point == "real":
        zero = (torch.rand(tiles, generator=generator) * 4).round().to(float_dtype(spec.scale_format))
    if spec.minimum is not None:
        minimum = torch.randint(0, 9, tiles, generator=generator) * scale.float()
        minimum = minimum.to(float_dtype(spec.minimum))  # type: ignore[arg-type]
    order = torch.randperm(layer.in_features, generator=generator).to(torch.int32) if spec.ordered else None
    return QTensor(codes, scale, zero, spec, minimum=minimum, order=order)


def random_layer(rng: random.Random) -> StoredLayer:
    rows, cols = rng.choice([16, 32, 64]), rng.choice([64, 128, 256])
    dtype = rng.choice(list(DTYPES))
    spec = random_spec(rng, cols, DTYPES[rng.choice([dtype, dtype, torch.float16])])
    token = spec.format == IntFormat(8) and spec.granularity == per_channel() and rng.random() < 0.7
    scheme = Scheme("random", spec, PRESETS["LLM_INT8"].input if token else None)
    return StoredLayer("m.up.weight", "m.up", "m.up", "Linear", "linear", rows, cols, 1, False, dtype, scheme)
