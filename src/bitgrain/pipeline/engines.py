"""Which engines load a result, and why not: `pipeline.engine_rules`, put to its layers. `bitgrain verify` checks a
written checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.fused import group_id, sibling_groups
from bitgrain.numerics import Format, Granularity, IntFormat, QuantSpec
from bitgrain.pipeline.engine_rules import BITGRAIN, RULES, Case, Inputs, Kernel, Rules


@dataclass(frozen=True)
class Verdict:
    """Whether `engine` loads the result; `reasons` say why not, or (loads) what it does differently.

    version: of the engine, whose rules were asked.
    """

    engine: str
    loads: bool
    reasons: tuple[str, ...] = ()
    version: str = field(default="", kw_only=True)

    @property
    def title(self) -> str:
        """`vLLM 0.33.0`."""
        return f"{self.engine} {self.version}".strip()


FusedGroup = tuple[str, Sequence[StoredLayer | None]]
"""A set of layers that engines join into one (q/k/v, gate/up) by its name; None for a member that is kept."""


def judge(layers: Sequence[StoredLayer], fused: Sequence[FusedGroup], layout: str) -> list[Verdict]:
    """The verdict of each engine that knows `layout` on a checkpoint with these quantized `layers` in it.

    What follows a colon in the name of a layout is a choice inside it: gguf:q4_k.
    """
    name = layout.partition(":")[0]
    found = [_judge(rules, layers, fused) for rules in RULES if name in rules.layouts]
    refused = ("it runs no ONNX graphs",) if name.startswith("onnx-") else ()
    return [*found, Verdict(BITGRAIN.name, not refused, refused, version=BITGRAIN.version)]


def judge_stored(layers: Sequence[StoredLayer], kept: Mapping[str, Sequence[int]], layout: str) -> list[Verdict]:
    """`judge` a written checkpoint; `kept`: shapes of the tensors that were not quantized. What engines join is told by
    names and shapes, as there is no model."""
    members = [(layer.tensor, layer.memory_module, layer.in_features) for layer in layers]
    for name, shape in kept.items():
        if len(shape) == 2 and name.endswith(".weight"):
            members.append((name, name.removesuffix(".weight"), shape[1]))
    by_name = {layer.tensor: layer for layer in layers}
    modules = {name: module for name, module, _ in members}
    groups = [
        (group_id([modules[name] for name in names]), [by_name.get(name) for name in names])
        for names in sibling_groups(members)
        if any(name in by_name for name in names)
    ]
    return judge(layers, groups, layout)


def why_not(rules: Rules, layer: StoredLayer, beside: bool = False) -> str | None:
    """Why the engine cannot load `layer`, in a checkpoint of several schemes or (not `beside`) of one; None: it can."""
    return next((case.text for case in rules.refused if _speaks_of(case, layer, beside)), None) or _no_kernel(
        rules.kernels, layer
    )


def _judge(rules: Rules, layers: Sequence[StoredLayer], fused: Sequence[FusedGroup]) -> Verdict:
    engine = rules.engine
    if rules.why:
        return Verdict(engine.name, False, (rules.why,), version=engine.version)
    alike: dict[object, list[StoredLayer]] = {}
    for layer in layers:
        alike.setdefault((layer.scheme, layer.role, layer.shape, layer.class_name), []).append(layer)
    beside = len({repr(first.scheme) for first, *_ in alike.values()}) > 1
    reasons: list[str | None] = [*_joined(fused)] if rules.joins else []
    for kind in alike.values():
        if why_not(rules, kind[0], beside) is not None:
            reasons += [why_not(rules, layer, beside) for layer in kind]
    refused = tuple(dict.fromkeys(reason for reason in reasons if reason))
    if refused:
        return Verdict(engine.name, False, refused, version=engine.version)
    remarks = [rules.needs]
    for first, *_ in alike.values():
        remarks += [case.text for case in rules.remarks if _speaks_of(case, first, beside)]
        kernel = next(kernel for kernel in rules.kernels if not any(_misfits(kernel, first)))
        remarks.append(kernel.remark.format(bits=first.scheme.weight.format.bits))
    return Verdict(engine.name, True, tuple(dict.fromkeys(text for text in remarks if text)), version=engine.version)


def _joined(fused: Sequence[FusedGroup]) -> Iterator[str]:
    """Why layers cannot become one matrix: the first group only."""
    for name, members in fused:
        if len({"kept" if member is None else repr(member.scheme) for member in members}) > 1:
            yield f"layers that it fuses have different schemes: {name}"
            return
    for name, members in fused:
        for member in members[:-1]:
            rows = member.scheme.weight.granularity.rows if member is not None else None
            if member is not None and rows and member.out_features % rows:
                yield f"layers that it fuses end inside a block of {rows} outputs: {name}"
                return


def _no_kernel(kernels: Sequence[Kernel], layer: StoredLayer) -> str | None:
    """Why none of `kernels` runs `layer`, told by those that come nearest; None: one does."""
    misfits = {kernel: _misfits(kernel, layer) for kernel in kernels}
    if any(not any(one) for one in misfits.values()):
        return None
    depth = max(one.index(True) for one in misfits.values())
    near = [kernel for kernel, one in misfits.items() if one.index(True) == depth]
    return _REASONS[depth](near, layer)


def _misfits(kernel: Kernel, layer: StoredLayer) -> list[bool]:
    """Which of a kernel's conditions `layer` does not meet, in the order of `_REASONS`."""
    spec, inputs = layer.scheme.weight, layer.scheme.input
    group = spec.granularity.cols or 1
    return [
        layer.role not in kernel.roles,
        _name(spec.format) not in kernel.formats,
        not any(_takes(one, inputs) for one in kernel.inputs),
        tile_of(spec.granularity) not in kernel.tiles,
        tile_of(spec.granularity) == "group" and bool(kernel.groups) and group not in kernel.groups,
        spec.zero_point not in kernel.zeros,
        spec.ordered and not kernel.ordered,
        bool(kernel.scales) and _storage(spec) not in kernel.scales,
        bool(layer.in_features % group or layer.out_features % kernel.outputs or layer.in_features % kernel.features),
    ]


def _takes(one: Inputs | None, spec: QuantSpec | None) -> bool:
    if one is None or spec is None:
        return one is spec
    return (
        _name(spec.format) == one.format
        and tile_of(spec.granularity) in one.tiles
        and spec.dynamic == one.dynamic
        and spec.zero_point in one.zeros
        and (one.threshold or not spec.threshold)
        and not spec.clusters
    )


def _speaks_of(case: Case, layer: StoredLayer, beside: bool) -> bool:
    spec, inputs = layer.scheme.weight, layer.scheme.input
    asked = {"": True, "none": inputs is None, "any": inputs is not None}
    return (
        (not case.roles or layer.role in case.roles)
        and (not case.formats or _name(spec.format) in case.formats)
        and (not case.tiles or tile_of(spec.granularity) in case.tiles)
        and (not case.groups or spec.granularity.cols in case.groups)
        and case.asymmetric in (None, not spec.symmetric)
        and asked.get(case.inputs, inputs is not None and _name(inputs.format) == case.inputs)
        and case.dynamic in (None, inputs is not None and inputs.dynamic)
        and (beside or not case.beside)
    )


def tile_of(granularity: Granularity) -> str:
    """`tensor`, `channel`, `group`, `block`, or the name of what no engine has."""
    return granularity.kind or granularity.name


def _name(format: Format) -> str:
    return f"int{format.bits}" if isinstance(format, IntFormat) else format.name


def _storage(spec: QuantSpec) -> str:
    return "nested" if isinstance(spec.scale, QuantSpec) else spec.scale.name


def _words(spec: QuantSpec) -> str:
    """`4-bit`, `FP8`, `nf4`."""
    if isinstance(spec.format, IntFormat):
        return f"{spec.format.bits}-bit"
    return {"fp8_e4m3": "FP8", "fp4_e2m1": "FP4"}.get(spec.format.name, spec.format.name)


def _activations(spec: QuantSpec) -> str:
    kind = _name(spec.format)
    return f"{'' if spec.dynamic else 'static '}{kind if kind.startswith('int') else _words(spec)} activations"


def _listed(words: Sequence[str], last: str) -> str:
    """`4, 5 and 8`."""
    return f" {last} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


_ROLES = {"lm_head": "output layers", "embedding": "embeddings", "router": "routers", "expert": "experts"}


def _of(layer: StoredLayer) -> str:
    return f" of {_ROLES[layer.role]}" if layer.role in _ROLES else ""


def _role(near: Sequence[Kernel], layer: StoredLayer) -> str:
    return f"{_ROLES.get(layer.role, layer.class_name)} stay in full precision there"


def _format(near: Sequence[Kernel], layer: StoredLayer) -> str:
    spec = layer.scheme.weight
    names = {name.removeprefix("int") for kernel in near for name in kernel.formats if name.startswith("int")}
    only = f", only {_listed(sorted(names), 'and')}" if names and isinstance(spec.format, IntFormat) else ""
    return f"no kernel for {_words(spec)} weights{_of(layer)}{only}"


def _inputs(near: Sequence[Kernel], layer: StoredLayer) -> str:
    inputs = layer.scheme.input
    what = "without quantized activations" if inputs is None else f"with {_activations(inputs)}"
    return f"no kernel for {_words(layer.scheme.weight)} weights{_of(layer)} {what}"


def _tiles(near: Sequence[Kernel], layer: StoredLayer) -> str:
    inputs = layer.scheme.input
    kernels = "weight-only kernels" if inputs is None else f"kernels with {_activations(inputs)}"
    tiles = dict.fromkeys(tile for kernel in near for tile in kernel.tiles)
    return f"{kernels} need scales {_listed([f'per {tile}' for tile in tiles], 'or')}"


def _groups(near: Sequence[Kernel], layer: StoredLayer) -> str:
    sizes = sorted({size for kernel in near for size in kernel.groups})
    return f"no kernel for groups of {layer.scheme.weight.granularity.cols}, only {_listed([*map(str, sizes)], 'and')}"


def _zeros(near: Sequence[Kernel], layer: StoredLayer) -> str:
    spec = layer.scheme.weight
    kind = {"none": "symmetric", "integer": "asymmetric"}.get(spec.zero_point, f"{spec.zero_point} zero point")
    return f"no kernel for {kind} {_words(spec)} weights"


def _order(near: Sequence[Kernel], layer: StoredLayer) -> str:
    return "no kernel for act-order, columns in an order of their own"


def _scales(near: Sequence[Kernel], layer: StoredLayer) -> str:
    names = dict.fromkeys(name for kernel in near for name in kernel.scales)
    return f"its scales are {_listed([*names], 'or')}, not {_storage(layer.scheme.weight)}"


def _sizes(near: Sequence[Kernel], layer: StoredLayer) -> str:
    kernel, group = near[0], layer.scheme.weight.granularity.cols or 1
    needs = [f"outputs % {kernel.outputs} = 0"] if kernel.outputs > 1 else []
    multiple = group if layer.in_features % group else kernel.features
    needs += [f"inputs % {multiple} = 0"] if multiple > 1 else []
    return f"{_words(layer.scheme.weight)} kernels need {' and '.join(needs)}, {layer.module} is {layer.shape}"


_REASONS = (_role, _format, _inputs, _tiles, _groups, _zeros, _order, _scales, _sizes)
