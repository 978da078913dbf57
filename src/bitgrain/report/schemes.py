"""The presets as a table, with every figure computed from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import Format, Granularity, QuantSpec
from bitgrain.pipeline.engine_rules import VLLM
from bitgrain.pipeline.engines import judge
from bitgrain.recipes import ALIASES, PRESETS, Scheme
from bitgrain.report.tables import markdown_table, new_table, say, show, table_row

__all__ = [
    "SchemeRow",
    "activation_text",
    "describe_schemes",
    "format_text",
    "granularity_text",
    "render_schemes",
    "sample_layer",
    "scheme_table_markdown",
    "short_text",
]

FEATURES = 4096
_COLUMNS = ("scheme", "weights", "activations", "bits", "on disk", "vLLM", "text")
_NOTE = (
    f"bits: stored per weight, scales included, of a {FEATURES}x{FEATURES} bfloat16 layer. "
    f"(e8m0): how scales are stored. vLLM: by the rules of version {VLLM.version}; docs/engines.md has every engine. "
    "text: needs one to calibrate static scales of activations, or to choose columns."
)


@dataclass(frozen=True)
class SchemeRow:
    """One preset. bits_per_weight: scales included, as stored; vllm: whether its rules allow such a layer."""

    name: str
    aliases: tuple[str, ...]
    weights: str
    activations: str
    bits_per_weight: float
    on_disk: str
    vllm: bool
    needs_calibration: bool


def describe_schemes() -> list[SchemeRow]:
    """Every preset, in the order of `PRESETS`."""
    return [_describe(scheme) for scheme in PRESETS.values()]


def render_schemes(console: Console) -> None:
    """Print the table."""
    table = new_table(console, *_COLUMNS, right=("bits",))
    for cells in _cells():
        table_row(table, *cells)
    show(console, table)
    say(console)
    say(console, _NOTE, "dim")
    say(console, "Schemes of your own go into a recipe file, or several schemes by layer: docs/recipes.md.", "dim")


def scheme_table_markdown() -> str:
    """The table for the README, without a line end behind it."""
    return markdown_table(_COLUMNS, _cells(), right=("bits",)) + f"\n\n{_NOTE}"


def granularity_text(granularity: Granularity) -> str:
    """`g128`, `channel`, `tensor`, `128x128 blocks`: short, for columns."""
    match (granularity.rows, granularity.cols):
        case (None, None):
            return "tensor"
        case (1, None):
            return "channel"
        case (1, int(size)):
            return f"g{size}"
        case (int(rows), int(cols)):
            return f"{rows}x{cols}"
        case _:
            return granularity.name


def format_text(format: Format) -> str:
    """`int4`, `fp8`, `fp4`: the only float grids of these widths that schemes use go by their widths."""
    return format.name.removesuffix("_e4m3").removesuffix("_e2m1")


def activation_text(scheme: Scheme) -> str:
    """What the inputs of a layer become: `int8 token`; `16-bit` where they are left as they are."""
    return "16-bit" if scheme.input is None else _spec_text(scheme.input, "token")


def short_text(scheme: Scheme) -> str:
    """`int4 g128 asym`; `int8 channel/token` where inputs are rounded to the same format."""
    weight = scheme.weight
    text = f"{format_text(weight.format)} {granularity_text(weight.granularity)}"
    if scheme.input is not None:
        clusters = scheme.input.clusters
        tile = f"{clusters} clusters" if clusters else granularity_text(scheme.input.granularity)
        other = "" if scheme.input.format == weight.format else f"{format_text(scheme.input.format)} "
        text += "/" + other + ("token" if tile == "channel" else tile)
    text = text if weight.symmetric else f"{text} asym"
    return text if weight.columns is None else f"{text} + {100 * weight.columns.share:g} % 16-bit"


def _cells() -> list[list[str]]:
    return [
        [
            row.name + "".join(f", {alias}" for alias in row.aliases),
            row.weights,
            row.activations,
            f"{row.bits_per_weight:.3f}",
            row.on_disk,
            "yes" if row.vllm else "no",
            "yes" if row.needs_calibration else "no",
        ]
        for row in describe_schemes()
    ]


def _describe(scheme: Scheme) -> SchemeRow:
    layer = sample_layer(scheme)
    layout = CompressedTensors()
    if layout.refusal(layer) is None:
        nbytes = sum(tensor.nbytes for tensor in layout.tensors(layer))
        bits, kind, name = 8 * nbytes / layer.elements, layout.config([layer], [])["format"], layout.name
    else:
        bits = layer.scheme.weight.count_bits(layer.shape) / layer.elements
        kind = name = "bitgrain"
    return SchemeRow(
        name=scheme.name,
        aliases=tuple(alias for alias, target in ALIASES.items() if target == scheme.name),
        weights=_spec_text(scheme.weight, "channel"),
        activations=activation_text(scheme),
        bits_per_weight=bits,
        on_disk=kind,
        vllm=next(verdict.loads for verdict in judge([layer], [], name) if verdict.engine == VLLM.name),
        needs_calibration=scheme.needs_calibration,
    )


def sample_layer(scheme: Scheme) -> StoredLayer:
    """A layer of a large model under `scheme`."""
    return StoredLayer(
        tensor="layer.weight",
        module="layer",
        memory_module="layer",
        class_name="Linear",
        role="linear",
        out_features=FEATURES,
        in_features=FEATURES,
        experts=1,
        transposed=False,
        dtype=torch.bfloat16,
        scheme=scheme.for_dtype(torch.bfloat16),
    )


def _spec_text(spec: QuantSpec, row: str) -> str:
    """`int4 g128 asym`; a row of a weight is a channel, one of activations a token."""
    tile = f"{spec.clusters} clusters" if spec.clusters else granularity_text(spec.granularity)
    parts = [format_text(spec.format), row if tile == "channel" else tile]
    if not spec.symmetric:
        parts.append("asym")
    if row == "token":
        parts += [] if spec.dynamic else ["static"]
    elif isinstance(spec.scale, QuantSpec) or spec.scale.name == "e8m0":
        parts.append(f"({spec.scale_format.name.removeprefix('fp8_')})")
    if spec.columns is not None:
        parts.append(f"+ {100 * spec.columns.share:g} % 16-bit")
    return " ".join(parts)
