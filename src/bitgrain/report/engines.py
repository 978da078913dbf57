"""Layout x scheme x engine, computed from what the layouts declare and from the engines' rules: docs/engines.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.checkpoints.onnx.form import Form
from bitgrain.checkpoints.onnx.forms import FORMS
from bitgrain.errors import SchemeError
from bitgrain.numerics import Format, QTensor, QuantSpec
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.quantize import quantize
from bitgrain.numerics.respell import respell
from bitgrain.pipeline.engine_rules import RULES, Rules
from bitgrain.pipeline.engines import Verdict, judge
from bitgrain.pipeline.gguf_types import candidates
from bitgrain.recipes import PRESETS, Scheme
from bitgrain.report.schemes import sample_layer
from bitgrain.report.tables import markdown_table

__all__ = ["HOLDERS", "Holder", "Row", "engine_tables_markdown", "rows_of"]

Holder = Callable[[StoredLayer], StoredLayer | str]
"""A layer as a file format says it exactly, or why it cannot."""

_STORAGES = (BF16, FP16, FP32)
_SAMPLE = (256, 512)
_EXACT, _REFUSED = "exact", "refused"


@dataclass(frozen=True)
class Row:
    """A preset in a layout. held: how its weights are said there, None where `refusal` says why they cannot be;
    verdicts: of the engines that know the layout."""

    scheme: str
    held: StoredLayer | None
    refusal: str
    verdicts: tuple[Verdict, ...]


def rows_of(layout: str) -> list[Row]:
    """Every preset in the layout, on a linear layer of a large bfloat16 model, in the order of `PRESETS`."""
    return [_row(scheme, layout) for scheme in PRESETS.values()]


def engine_tables_markdown() -> str:
    """What docs/engines.md has between its marks, without a line end behind it."""
    parts = ["### Which layers", _layers_table()]
    for name in (*LAYOUTS, *HOLDERS):
        parts += [f"### {name}", *_layout_parts(name)]
    return "\n\n".join(parts)


def _row(scheme: Scheme, name: str) -> Row:
    layer = sample_layer(scheme)
    held = _hold(layer, LAYOUTS[name]) if name in LAYOUTS else HOLDERS[name](layer)
    if isinstance(held, str):
        return Row(scheme.name, None, _without_details(held, layer), ())
    return Row(scheme.name, held, "", tuple(judge([held], [], name)))


def _hold(layer: StoredLayer, layout: Layout | Form) -> StoredLayer | str:
    """`layer` as the layout says it, with scales stored as it wants them, or why it cannot."""
    spec = layer.scheme.weight
    storages: tuple[Format, ...] = getattr(layout, "storages", ())
    if storages and spec.scale not in storages:
        spec = spec.with_scale_dtype(storages[0])
    layer = replace(layer, scheme=replace(layer.scheme, weight=spec))
    reasons: list[str] = []
    for other in dict.fromkeys((spec, *layout.spellings(layer))):
        candidate = replace(layer, scheme=replace(layer.scheme, weight=other))
        refusal = layout.refusal(candidate)
        if refusal is None and _says_the_same(spec, other):
            return candidate
        reasons.append(refusal or f"{other.describe()} is not the same")
    return reasons[0]


def _in_gguf(layer: StoredLayer) -> StoredLayer | str:
    """`layer` in the first block type that has its numbers."""
    if layer.scheme.input is not None:
        return "GGUF holds weights; llama.cpp quantizes inputs as it likes"
    spec = layer.scheme.weight
    for kind in candidates(layer, None):
        if kind.spec is not None and _says_the_same(spec, kind.spec):
            return replace(layer, scheme=replace(layer.scheme, weight=kind.spec))
    return f"no block type has the numbers of {spec.describe()}"


def _in_onnx(form: Form) -> Holder:
    return lambda layer: _hold(layer, form)


HOLDERS: dict[str, Holder] = {"gguf": _in_gguf, **{name: _in_onnx(form) for name, form in FORMS.items()}}
"""File formats that are no layout of a safetensors folder, by the name that `--to` has."""


def _says_the_same(spec: QuantSpec, other: QuantSpec) -> bool:
    """Whether codes of `spec` are said exactly by `other`, tried on random weights."""
    if other == spec:
        return True
    try:
        respell(_sample(spec), other, torch.bfloat16)
    except SchemeError:
        return False
    return True


@cache
def _sample(spec: QuantSpec) -> QTensor:
    return quantize(torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0)), spec)


def _without_details(refusal: str, layer: StoredLayer) -> str:
    """The same for all schemes of a kind."""
    inputs = layer.scheme.input
    text = refusal.replace(f", for {layer.module}", "").replace(f" for {layer.module}", "")
    spec = layer.scheme.weight
    details = [spec.with_scale_dtype(storage).describe() for storage in _STORAGES]
    for detail in (*details, "" if inputs is None else inputs.describe(), str(spec.granularity)):
        text = text.replace(detail, "...") if detail else text
    return text


def _layout_parts(name: str) -> Iterator[str]:
    rows, notes = rows_of(name), dict[str, int]()
    if name in LAYOUTS:
        yield f"For {LAYOUTS[name].summary}."
    held = [row for row in rows if row.held is not None]
    if held:
        engines = [verdict.title for verdict in held[0].verdicts]
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in held:
            cells = (_file_text(row), *(_cell(verdict, notes) for verdict in row.verdicts))
            alike.setdefault(cells, []).append(row.scheme)
        table = [[", ".join(schemes), *cells] for cells, schemes in alike.items()]
        yield markdown_table(("schemes", "file", *engines), table)
    if notes:
        yield "\n".join(f"{number}. {text}" for text, number in notes.items())
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.held is None:
            refused.setdefault(row.refusal, []).append(row.scheme)
    if refused:
        yield "Refused by the layout:"
        yield "\n".join(f"- {', '.join(schemes)}: {reason}" for reason, schemes in refused.items())


def _file_text(row: Row) -> str:
    assert row.held is not None
    own = sample_layer(PRESETS[row.scheme]).scheme.weight
    changed = [
        text
        for text, differs in (
            (f"as {row.held.scheme.weight.format}", row.held.scheme.weight.format != own.format),
            ("with zero points", row.held.scheme.weight.zero_point != own.zero_point),
            (f"{row.held.scheme.weight.granularity}", row.held.scheme.weight.granularity != own.granularity),
        )
        if differs
    ]
    return " ".join([_EXACT, *changed])


def _cell(verdict: Verdict, notes: dict[str, int]) -> str:
    numbers = [str(notes.setdefault(reason, len(notes) + 1)) for reason in verdict.reasons]
    return (_EXACT if verdict.loads else _REFUSED) + (f" ({', '.join(numbers)})" if numbers else "")


def _layers_table() -> str:
    columns = ("engine", "layout", "output layer", "embeddings", "experts", "routers", "q, k, v and gate, up")
    return markdown_table(columns, [_layers_row(rules) for rules in RULES if rules.kernels])


def _layers_row(rules: Rules) -> list[str]:
    runs = {role for kernel in rules.kernels for role in kernel.roles}
    return [
        f"{rules.engine.name} {rules.engine.version}",
        ", ".join(rules.layouts),
        *("yes" if role in runs else "no" for role in ("lm_head", "embedding", "expert", "router")),
        "share a scheme" if rules.joins else "any",
    ]
