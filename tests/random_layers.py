"""Layers as people and other engines quantize them, drawn at random, with random codes and scales."""

from __future__ import annotations

import random
from typing import Any

import torch

from bitgrain.checkpoints.gguf.types import BLOCK_TYPES
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import Granularity, IntFormat, QTensor, QuantSpec, get_format, per_channel, quantize
from bitgrain.numerics.formats import BF16, FP16, FP32, Format
from bitgrain.numerics.packed import float_dtype
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.spec import bnb_4bit, mxfp4, nf4_double_quantized, nvfp4
from bitgrain.recipes import PRESETS, Scheme

_SOLVED = [mxfp4(), nvfp4(), nf4_double_quantized(), bnb_4bit(), bnb_4bit("bnb_fp4"), bnb_4bit("bnb_fp4", double=False)]
"""Whose scales are no numbers of any kind, but made of the weights."""
_BLOCKS = [found.spec for found in BLOCK_TYPES.values() if found.spec is not None and found.spec not in _SOLVED]
"""llama.cpp's: minima, nested scales, ternary codes, codebooks."""
_CODES = ["nf4", "bnb_fp4", "iq4_nl", "fp4_e2m1", "fp8_e4m3", "fp8_e5m2", "ternary", "binary"]
DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


def random_spec(rng: random.Random, cols: int, storage: Any) -> QuantSpec:
    """What people quantize weights to, and what other engines do."""
    kind = rng.randrange(20)
    if kind < len(_SOLVED):
        return _SOLVED[kind]
    if kind < 10:
        return rng.choice(_BLOCKS)
    groups = [g for g in (16, 32, 64, 128, 256) if cols % g == 0 or rng.random() < 0.1]
    granularity = Granularity(1, rng.choice([*groups, *groups, None]))
    if rng.random() < 0.06:
        granularity = rng.choice([Granularity(None, None), Granularity(4, 32), Granularity(16, 16)])
    if kind < 12:
        return QuantSpec(get_format(rng.choice(_CODES)), granularity, scale=storage)
    if kind < 14:
        return QuantSpec(IntFormat(8), per_channel(), restricted=rng.random() < 0.7, scale=storage)
    bits = rng.choice([2, 3, 4, 4, 4, 5, 6, 8, 8])
    format = get_format(f"{rng.choice(['int', 'int', 'uint'])}{bits}")
    zero = rng.choice(["none", "integer", "integer", "minimum", "real"])
    ordered = granularity.cols is not None and rng.random() < 0.15
    minimum = storage if zero == "minimum" else None
    return QuantSpec(format, granularity, zero_point=zero, scale=storage, minimum=minimum, ordered=ordered)


def random_matrix(rng: random.Random, layer: StoredLayer) -> QTensor:
    """Random codes, scales, zero points and order; now and then such as fit another layout as well."""
    spec, generator = layer.scheme.weight, torch.Generator().manual_seed(rng.randrange(2**31))
    if spec in _SOLVED:
        return quantize(torch.randn(layer.shape, generator=generator) * 0.1, spec)
    tiles = spec.granularity.tiles(layer.shape)
    first, easy = -spec.format.code_offset, rng.random() < 0.5
    codes = _codes(spec.format, layer.shape, generator, spec.restricted)
    signs = spec.signed_scale and rng.random() < 0.3
    scale = _scales(spec.scale, tiles, generator, easy, signs, zeros=rng.random() < 0.2)
    zero = minimum = None
    if spec.zero_point == "integer":
        middle = first + 2 ** (spec.format.bits - 1)
        zero = torch.randint(first, first + 2**spec.format.bits, tiles, generator=generator)
        zero = (torch.full_like(zero, middle) if easy and rng.random() < 0.5 else zero).to(spec.format.code_dtype)
    elif spec.zero_point == "real":
        zero = (torch.rand(tiles, generator=generator) * 4).round().to(float_dtype(spec.scale_format))
    if isinstance(spec.minimum, QuantSpec):
        minimum = _scales(spec.minimum, tiles, generator, easy)
    elif spec.minimum is not None:
        steps = scale_values(scale) if rng.random() < 0.7 else torch.rand(tiles, generator=generator)
        lowest = rng.choice([0, -8])
        minimum = torch.randint(lowest, 9, tiles, generator=generator) * steps
        minimum = minimum.to(float_dtype(spec.minimum))
    order = torch.randperm(layer.in_features, generator=generator).to(torch.int32) if spec.ordered else None
    return QTensor(codes, scale, zero, spec, minimum=minimum, order=order)


def _codes(format: Format, shape: tuple[int, int], generator: torch.Generator, restricted: bool = False) -> Any:
    first = -format.code_offset
    if isinstance(format, IntFormat):
        codes = torch.randint(first + restricted, first + 2**format.bits, shape, generator=generator)
        return codes.to(format.code_dtype)
    grid = format.grid()
    return format.encode(grid[torch.randint(0, len(grid), shape, generator=generator)])


def _scales(
    storage: Format | QuantSpec,
    tiles: tuple[int, int],
    generator: torch.Generator,
    easy: bool,
    signs: bool = False,
    zeros: bool = False,
) -> torch.Tensor | QTensor:
    """easy: powers of two, which most storages hold; signs, zeros: some are negative, or 0."""
    if isinstance(storage, QuantSpec):
        outer = _scales(storage.scale, storage.granularity.tiles(tiles), generator, easy)
        return QTensor(_codes(storage.format, tiles, generator), outer, None, storage)
    scale = torch.rand(tiles, generator=generator) * 0.1 + 1e-3
    scale = torch.exp2(torch.log2(scale).floor()) if easy else scale
    scale *= 2.0 ** (0, 0, 0, 0, 0, 8, -14)[int(torch.randint(7, (), generator=generator))]  # subnormal in float16
    if signs:
        scale *= torch.randint(0, 2, tiles, generator=generator) * 2 - 1
    if zeros:
        scale *= torch.rand(tiles, generator=generator) < 0.9
    return scale.to(float_dtype(storage))


def random_layer(rng: random.Random, given: Scheme | None = None) -> StoredLayer:
    """A linear layer; some are of other shapes than most layouts hold, stacked, or stored as [in, out]. `given`: its
    scheme, with a shape that is whole blocks of all sizes."""
    even = given is not None or rng.random() < 0.85
    rows = rng.choice([16, 32, 64] if even else [5, 24, 40])
    cols = rng.choice([256, 512] if given else [64, 128, 256, 512] if even else [48, 96, 288, 320])
    dtype = rng.choice(list(DTYPES))
    experts = rng.choice([2, 3]) if rng.random() < 0.06 else 1
    transposed = rng.random() < 0.06
    class_name = "Conv1D" if transposed else "Linear"
    scheme = given or random_scheme(rng, cols, dtype)
    return StoredLayer(
        "m.up.weight", "m.up", "m.up", class_name, "linear", rows, cols, experts, transposed, dtype, scheme
    )


def random_scheme(rng: random.Random, cols: int, dtype: torch.dtype) -> Scheme:
    """For a model of `dtype`."""
    spec = random_spec(rng, cols, DTYPES[rng.choice([dtype, dtype, torch.float16])])
    token = spec.format == IntFormat(8) and spec.granularity == per_channel() and rng.random() < 0.7
    return Scheme("random", spec, PRESETS[rng.choice(["LLM_INT8", "W8A8"])].input if token else None)
