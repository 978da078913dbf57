"""A plan for people: what it costs, which layer gets what, what cannot be done."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console

from bitgrain.checkpoints.disk_space import format_bytes
from bitgrain.pipeline.context import Context
from bitgrain.pipeline.engines import Verdict
from bitgrain.pipeline.plan import Plan, PlannedLayer
from bitgrain.recipes import OnIndivisible
from bitgrain.report.names import Group, few_names, group_names
from bitgrain.report.tables import count_text, facts, new_table, percent_text, say, show, table_row

__all__ = ["engine_lines", "problem_lines", "render_contexts", "render_plan", "render_short_plan"]

LayerKey = tuple[str, str]
"""Shape and scheme of a layer, as they are shown."""


def render_plan(plan: Plan, console: Console, *, all_layers: bool = False) -> None:
    """Print `plan`; layers that differ in their numbers only are one line, unless `all_layers`."""
    parameters = sum(plan.anatomy.sizes.values())
    blocks = len(plan.anatomy.block_names)
    say(
        console,
        f"{plan.source.name}: {plan.anatomy.architecture}, {count_text(parameters)} parameters, {blocks} blocks",
        "bold",
    )
    say(console)
    files = f"{len(plan.shards)} file{'s' if len(plan.shards) != 1 else ''}"
    workers = f"{plan.workers} worker{'s' if plan.workers != 1 else ''}"
    facts(
        console,
        [
            ("size", _size(plan)),
            ("bits per weight", f"{plan.bits_per_weight:.3f} in quantized layers, scales included"),
            ("bits per parameter", f"{plan.bits_per_parameter:.3f} over the whole model"),
            ("peak RAM", f"about {format_bytes(plan.peak_ram)} above Python and torch, with {workers}"),
            ("disk needed", f"{format_bytes(plan.bytes_after)} in {files}, {plan.layout.name} layout"),
            *_coverage(plan, parameters),
        ],
    )
    say(console)
    table = new_table(console, "layers", "n", "shape", "scheme", right=("n",))
    rows = [(planned.weight.module, _key(planned, plan.recipe.on_indivisible)) for planned in plan.layers]
    for group in [Group(name, 1, key) for name, key in rows] if all_layers else group_names(rows):
        shape, scheme = group.key
        table_row(table, group.name, str(group.count), shape, scheme, style="dim" if scheme.startswith("kept") else "")
    show(console, table)
    others = len(plan.anatomy.others) + len(plan.anatomy.unexpected)
    if others:
        say(console, f"and {others} other tensors (norms, biases and the like), copied", "dim")
    say(console)
    say(console, "loads in", "bold")
    facts(console, engine_lines(plan.engines))
    if plan.notes:
        say(console)
    for note in plan.notes:
        say(console, f"note: {note}", "yellow", indent="  ")
    if plan.problems:
        say(console)
        say(console, "this cannot be done as asked:", "bold red")
        for line in problem_lines(plan):
            say(console, f"- {line}", indent="  ")


def render_contexts(contexts: Sequence[Context], memory: int, console: Console) -> None:
    """Print how long a context fits into `memory` bytes."""
    say(console)
    say(console, f"context that fits into {format_bytes(memory)} of keys and values, for one text", "bold")
    table = new_table(console, "kv cache", "1000 tokens", "tokens", right=("1000 tokens", "tokens"))
    for one in contexts:
        if one.refusal:
            table_row(table, one.name, "", one.refusal, style="dim")
        else:
            tokens = "any number" if one.tokens is None else f"{one.tokens:,}".replace(",", " ")
            table_row(table, one.name, format_bytes(one.bytes_1000), tokens)
    show(console, table)


def render_short_plan(plan: Plan, console: Console) -> None:
    """A few lines, for the head of a run."""
    parameters = sum(plan.anatomy.sizes.values())
    say(console, f"{plan.source.name}: {plan.anatomy.architecture}, {count_text(parameters)} parameters", "bold")
    covered = [
        f"{name} on {percent_text(count / parameters)}" for name, count in plan.coverage().items() if name != "kept"
    ]
    engines = ", ".join(verdict.title for verdict in plan.engines if verdict.loads)
    facts(
        console,
        [
            ("size", f"{_size(plan)}, {plan.bits_per_weight:.3f} bits per weight in quantized layers"),
            ("scheme", f"{', '.join(covered) or 'none'} of the parameters, solver {plan.recipe.solver}"),
            ("peak RAM", f"about {format_bytes(plan.peak_ram)}"),
            ("loads in", engines),
        ],
    )
    for note in plan.notes:
        say(console, f"note: {note}", "yellow", indent="  ")


def _key(planned: PlannedLayer, on_indivisible: OnIndivisible) -> LayerKey:
    weight = planned.weight
    stack = f"{weight.experts}x " if weight.experts > 1 else ""
    shape = f"{stack}{weight.out_features}x{weight.in_features}"
    if planned.layer is None:
        why = "groups do not divide it" if planned.note else weight.role.replace("_", " ")
        return shape, "kept" if why in ("linear", "expert") else f"kept ({why})"
    remark = {"pad": " (padded)", "error": " (groups do not divide it)"}.get(on_indivisible, "") if planned.note else ""
    return shape, planned.layer.scheme.name + remark


def problem_lines(plan: Plan) -> list[str]:
    """The plan's problems; one line for layers that differ in their numbers only and have the same problem."""
    modules = {planned.weight.module for planned in plan.layers}
    names: dict[str, list[str]] = {}
    for problem in plan.problems:
        module, _, rest = problem.partition(": ")
        if module in modules and rest:
            names.setdefault(rest, []).append(module)
        else:
            names.setdefault(problem, [])
    return [f"{few_names(those)}: {text}" if those else text for text, those in names.items()]


_SHAPE = re.compile(r"(?P<what>.+), (?P<layer>\S+) is \(\d+, \d+\)")


def engine_lines(engines: Sequence[Verdict]) -> list[tuple[str, str]]:
    """(engines, "yes" or "no" and the reasons); engines of the same verdict together, layers of the same reason too."""
    names: dict[str, list[str]] = {}
    for verdict in engines:
        reasons = "; ".join(_join_reasons(verdict.reasons))
        text = "yes" if verdict.loads else "no"
        names.setdefault(f"{text}: {reasons}" if reasons else text, []).append(verdict.title)
    return [(", ".join(those), text) for text, those in names.items()]


def _join_reasons(reasons: Sequence[str]) -> list[str]:
    layers: dict[str, list[str]] = {}
    for reason in reasons:
        match = _SHAPE.fullmatch(reason)
        layers.setdefault(match["what"] if match else reason, []).extend([match["layer"]] if match else [])
    return [f"{what} ({few_names(those, 1)})" if those else what for what, those in layers.items()]


def _size(plan: Plan) -> str:
    before, after = plan.bytes_before, plan.bytes_after
    return f"{format_bytes(before)} -> {format_bytes(after)} ({percent_text(after / before)})"


def _coverage(plan: Plan, parameters: int) -> list[tuple[str, str]]:
    lines = [
        f"{count_text(count)} parameters {'kept' if name == 'kept' else name} ({percent_text(count / parameters)})"
        for name, count in plan.coverage().items()
    ]
    return [("coverage" if i == 0 else "", line) for i, line in enumerate(lines)]
