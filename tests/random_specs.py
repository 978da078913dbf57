"""Hypothesis strategies: any QuantSpec, any layer that a layout may be asked to hold, and its quantized weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import settings
from hypothesis import strategies as st

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import SchemeError
from bitgrain.numerics import Granularity, QTensor, QuantSpec, get_format, per_tensor
from bitgrain.numerics.clusters import Clusters
from bitgrain.numerics.columns import ColumnChoice, Columns
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.numerics.observers import StaticInput, start, static_input, update
from bitgrain.numerics.outliers import Outliers
from bitgrain.numerics.ranges import MinMax, get_range
from bitgrain.recipes import PRESETS, Scheme
from bitgrain.solvers import get_solver
from bitgrain.solvers.beside import solve_matrix

PLAIN = [name for name, scheme in PRESETS.items() if scheme.weight.columns is None]
"""Presets whose weights any solver takes by itself."""
LAWS = settings(deadline=None, derandomize=True, max_examples=60)
"""The same examples in every run, so that a failure here is a failure everywhere."""

FORMATS = (
    *(f"int{bits}" for bits in range(1, 9)),
    *(f"uint{bits}" for bits in range(1, 9)),
    *("int16", "uint16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4", "bnb_fp4", "ternary", "binary"),
)
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
RANGES = ("minmax", "mse", "percentile")
SHARES = (0.0, 0.0, 0.02, 0.3)
KEPT = (None, None, ColumnChoice(0.02), ColumnChoice(0.3, "weight"), ColumnChoice(0.1, "random", 5))
PLAIN_SCALES = ("float32", "float16", "bfloat16", "e8m0", "fp8_e4m3", "fp8_e5m2")
TILES = (
    *((None, None), (1, None), (None, 1), (1, 3), (1, 4), (1, 16), (1, 32), (4, None), (None, 8)),
    *((2, 3), (4, 4), (16, 16), (3, 8)),
)


ASYMMETRIC_INPUT = QuantSpec(get_format("int8"), per_tensor(), zero_point="integer")
"""Static inputs with a zero point."""


@st.composite
def specs(
    draw,
    nested: bool = True,
    ranges: tuple[str, ...] = ("minmax",),
    outliers: tuple[float, ...] = (0.0,),
    columns: tuple[ColumnChoice | None, ...] = (None,),
    minima: bool = True,
) -> QuantSpec:
    """Any combination that a QuantSpec accepts; `nested` also draws double quantization, and k-quants."""
    if nested and minima and draw(st.integers(0, 7)) == 0:
        k = GGUF_TYPES[draw(st.sampled_from(K_QUANTS))]
        return replace(k, range=get_range(draw(st.sampled_from(ranges))), outliers=draw(st.sampled_from(outliers)),
                       columns=draw(st.sampled_from(columns)))  # fmt: skip
    return draw(_candidates(nested, ranges, outliers, columns, minima).filter(lambda spec: spec is not None))


@st.composite
def _candidates(
    draw,
    nested: bool,
    ranges: tuple[str, ...],
    outliers: tuple[float, ...],
    columns: tuple[ColumnChoice | None, ...],
    minima: bool,
) -> QuantSpec | None:
    scale = get_format(draw(st.sampled_from(PLAIN_SCALES)))
    if nested and draw(st.integers(0, 3)) == 0:
        scale = draw(specs(nested=False, minima=False).filter(_quantizes_scales))
    zero_point = draw(
        st.sampled_from(["none", "integer", "real", "minimum"] if minima else ["none", "integer", "real"])
    )
    minimum = None
    if zero_point == "minimum":
        minimum = get_format(draw(st.sampled_from(PLAIN_SCALES)))
        if nested and isinstance(scale, QuantSpec):
            minimum = draw(specs(nested=False, minima=False).filter(_quantizes_scales))
    try:
        return QuantSpec(
            format=get_format(draw(st.sampled_from(FORMATS))),
            granularity=Granularity(*draw(st.sampled_from(TILES))),
            zero_point=zero_point,
            minimum=minimum,
            restricted=draw(st.booleans()),
            range=get_range(draw(st.sampled_from(ranges))),
            scale=scale,
            outliers=draw(st.sampled_from(outliers)),
            columns=draw(st.sampled_from(columns)),
        )
    except SchemeError:
        return None


def _quantizes_scales(spec: QuantSpec) -> bool:
    """Scales are not negative: a format of negative numbers, or of two, says nothing about them."""
    return spec.format.bits >= 4 and spec.format.name not in ("nf4", "bnb_fp4", "int16", "uint16")


@st.composite
def layers(draw, schemes: st.SearchStrategy[Scheme], **fixed) -> StoredLayer:
    """A small layer; `fixed` replaces what would be drawn."""
    transposed, experts = draw(st.booleans()), draw(st.sampled_from([1, 1, 3]))
    settings = {
        "tensor": "model.layers.0.up.weight",
        "module": "model.layers.0.up",
        "memory_module": "model.layers.0.up",
        "class_name": "Linear",
        "role": "linear",
        "out_features": draw(st.integers(1, 40)),
        "in_features": draw(st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 128]))),
        "experts": experts,
        "transposed": transposed,
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    } | fixed
    return StoredLayer(**settings, scheme=draw(schemes).for_dtype(settings["dtype"]))


def any_scheme(nested: bool = True) -> st.SearchStrategy[Scheme]:
    """Presets and inventions."""
    names = ("W8A8", "FP8_DYNAMIC", "W8A16INT16", "W8A8_STATIC", "FP8")
    inputs = st.sampled_from([None, ASYMMETRIC_INPUT, *(PRESETS[name].input for name in names)])
    weights = specs(nested=nested, outliers=SHARES, columns=KEPT)
    invented = st.tuples(weights, inputs).filter(_fits).map(lambda both: Scheme("invented", *both))
    return st.one_of(st.sampled_from(list(PRESETS.values())), invented)


def _fits(both: tuple[QuantSpec, QuantSpec | None]) -> bool:
    """Columns are kept beside dynamic inputs only."""
    return both[0].columns is None or both[1] is None or both[1].dynamic


def quantized_parts(layer: StoredLayer, seed: int) -> list[QTensor]:
    """Random weights of `layer` under its own spec, one QTensor for each stacked matrix."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(layer.experts):
        weight = torch.randn(layer.shape, generator=generator) * 0.1
        weight[0] = 0.0 if seed % 3 == 0 else weight[0]
        if seed % 5 == 0:
            weight[-1, -1] = 7.0
        spec = layer.scheme.weight
        magnitude = torch.rand(layer.in_features, generator=generator)
        parts.append(solve_matrix(get_solver("rtn"), weight, spec, magnitude=magnitude).q)
    return parts


def static_inputs(layer: StoredLayer, seed: int) -> list[StaticInput]:
    """Random scales of static inputs, one for each stacked matrix; none where the layer has no such inputs."""
    spec = layer.static_input
    if spec is None:
        return []
    generator = torch.Generator().manual_seed(seed)
    used = max(1, spec.clusters - seed % 3)
    found = [
        static_input(update(start(MinMax()), torch.randn(50, generator=generator) + 0.5), spec)
        for _ in range(used if spec.clusters else layer.experts)
    ]
    if not spec.clusters:
        return found
    order = torch.randperm(layer.in_features, generator=generator)
    sizes = (layer.in_features - used + 1, *([1] * (used - 1)))
    return [StaticInput.of_clusters(found, Clusters(order, sizes), spec.clusters)]


def same_inputs(a: list[StaticInput], b: list[StaticInput]) -> bool:
    """Every scale and zero point, and of clusters sizes and order."""
    pairs = [
        (getattr(one, field), getattr(other, field))
        for one, other in zip(a, b, strict=True)
        for field in ("scale", "zero", "sizes", "order")
    ]
    return all(x is y is None or (x is not None and y is not None and same_bits(x, y)) for x, y in pairs)


def same(a: QTensor, b: QTensor) -> bool:
    """Every code, scale, zero point and minimum, with their dtypes."""
    kept = same_outliers(a.outliers, b.outliers) and same_columns(a.columns, b.columns)
    stored = ((a.scale, b.scale), (a.zero, b.zero), (a.minimum, b.minimum))
    return same_bits(a.codes, b.codes) and all(same_stored(*pair) for pair in stored) and kept


def same_stored(a: torch.Tensor | QTensor | None, b: torch.Tensor | QTensor | None) -> bool:
    """Scales, zero points or minima, plain or nested."""
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return same(a, b)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_bits(a, b)
    return a is b


def same_outliers(a: Outliers | None, b: Outliers | None) -> bool:
    """Every place and value."""
    if a is None or b is None:
        return a is b
    names = ("starts", "columns", "values")
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in names)


def same_columns(a: Columns | None, b: Columns | None) -> bool:
    """Every column and value."""
    if a is None or b is None:
        return a is b
    return same_bits(a.index, b.index) and same_bits(a.values, b.values)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype).copy_(x).reshape(-1).view(torch.uint8)
