"""An `Inspection` as tables: kinds of layers first, then the worst layers, then what follows from the figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitgrain.evaluation.inspection.activations import ActivationInspection
from bitgrain.evaluation.inspection.channels import OUTLIER_RATIO, ChannelRanges
from bitgrain.evaluation.inspection.job import Inspection
from bitgrain.evaluation.inspection.weights import FORMATS, LayerInspection

__all__ = ["render_inspection"]

WORST = 10
_KIND_COLUMNS = (
    ("int8", "per_channel", "channel"),
    ("int4", "per_tensor", "tensor"),
    ("int4", "per_channel", "channel"),
    ("int4", "per_group(128)", "group 128"),
    ("int4", "per_group(32)", "group 32"),
)
_LAYER_COLUMNS = (
    ("int8", "per_channel", "chan"),
    ("int4", "per_tensor", "tens"),
    ("int4", "per_block(128, 128)", "blck"),
    ("int4", "per_channel", "chan"),
    ("int4", "per_channel(1)", "in*"),
    ("int4", "per_group(128)", "g128"),
    ("int4", "per_group(32)", "g32"),
)
_INPUT_COLUMNS = (
    ("int8", "per_tensor", "tensor"),
    ("int8", "per_token", "token"),
    ("int8", "per_group(128)", "group 128"),
    ("int8", "per_channel", "channel*"),
    ("fp8_e4m3", "per_tensor", "tensor"),
    ("fp8_e4m3", "per_token", "token"),
)
_NAMES = {"fp8_e4m3": "fp8"}


def render_inspection(inspection: Inspection, console: Console, *, all_layers: bool = False) -> None:
    """Print `inspection`: every layer with `all_layers`, else the ten worst. Without colour or lines off a terminal."""
    summary = inspection.summary
    weights = sum(layer.elements for layer in inspection.layers)
    say = _Writer(console)
    say.line(
        f"{inspection.model} ({inspection.architecture}): {len(inspection.layers)} layers, {_count(weights)} weights",
        "bold",
    )
    say.table(_kinds(inspection, say.lines))
    if all_layers:
        say.table(_layers(inspection.layers, "Every layer: SQNR in dB", say.lines))
    else:
        by_name = {layer.module: layer for layer in inspection.layers}
        worst = [by_name[name] for name in summary.sensitive[:WORST]]
        if worst:
            title = f"The {len(worst)} layers that lose most at int4 per_group(128): SQNR in dB"
            say.table(_layers(worst, title, say.lines))
    say.line("in*: per_channel(1), a scale for each input channel. It cannot leave the sum over the inputs.", "dim")
    if inspection.activations:
        _inputs(inspection, inspection.activations, say, all_layers)
    say.gap()
    say.line("Recommendation", "bold")
    for text in _recommendation(inspection):
        say.line(text)
    for note in inspection.notes:
        say.line(f"note: {note}", "yellow")


class _Writer:
    """Prints text as it is: a name may hold [brackets]."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.lines = console.is_terminal

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=False)

    def gap(self) -> None:
        self._console.print()

    def table(self, table: Table) -> None:
        self.gap()
        self._console.print(table)


def _table(title: str, lines: bool) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if lines else None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _add_numbers(table: Table, heads: Iterable[str]) -> None:
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)


def _kinds(inspection: Inspection, lines: bool) -> Table:
    table = _table("Weights by kind: SQNR in dB (median, worst); largest ratio and kurtosis", lines)
    table.add_column("kind", overflow="fold")
    _add_numbers(table, ["n", *(f"{format}\n{short}" for format, _, short in _KIND_COLUMNS)])
    _add_numbers(table, ["ratio\nout", "ratio\nin", "kur-\ntosis"])
    for kind in inspection.summary.kinds:
        cells = [kind.sqnr.get(f"{format} {name}") for format, name, _ in _KIND_COLUMNS]
        table.add_row(
            Text(kind.kind),
            str(kind.layers),
            *(_pair(cell) for cell in cells),
            *(_short(value) for value in (kind.output_ratio, kind.input_ratio, kind.kurtosis)),
        )
    return table


def _layers(layers: Iterable[LayerInspection], title: str, lines: bool) -> Table:
    table = _table(title, lines)
    table.add_column("layer", overflow="fold")
    table.add_column("shape", no_wrap=True)
    _add_numbers(table, [f"{format}\n{short}" for format, _, short in _LAYER_COLUMNS])
    _add_numbers(table, ["outliers\nout, in"])
    for layer in layers:
        stack = f"{layer.matrices}x" if layer.matrices > 1 else ""
        outliers = f"{layer.outputs.outliers}, {layer.inputs.outliers}" if layer.outputs and layer.inputs else "NaN"
        table.add_row(
            Text(layer.module),
            f"{stack}{layer.shape[0]}x{layer.shape[1]}",
            *(_db(layer.sqnr(name, format)) for format, name, _ in _LAYER_COLUMNS),
            outliers,
        )
    return table


def _joined(sites: Sequence[ActivationInspection]) -> list[ActivationInspection]:
    """Inputs that several layers share (q, k and v), once, as the layer that loses most: `q_proj +2`."""
    groups: list[list[ActivationInspection]] = []
    for site in sites:
        same = groups and site.losses and _input_key(site) == _input_key(groups[-1][0])
        if same:
            groups[-1].append(site)
        else:
            groups.append([site])
    return [
        replace(worst, module=f"{worst.module} +{len(group) - 1}", kind=f"{group[0].kind} +{len(group) - 1}")
        if len(group) > 1
        else worst
        for group in groups
        for worst in (min(group, key=_token_db),)
    ]


def _input_key(site: ActivationInspection) -> object:
    return site.block, site.channels, tuple(loss.sqnr_db for loss in site.losses)


def _inputs(inspection: Inspection, all_sites: Sequence[ActivationInspection], say: _Writer, all_layers: bool) -> None:
    sites = _joined(all_sites)
    kinds: dict[str, list[ActivationInspection]] = defaultdict(list)
    for site in sites:
        kinds[site.kind].append(site)
    use = inspection.text
    seen = f" ({use.windows} windows of {use.seqlen} tokens)" if use else ""
    table = _table(f"Inputs by kind{seen}: felt SQNR in dB (median, worst)", say.lines)
    table.add_column("input of", overflow="fold")
    _add_numbers(table, ["n", *(f"{_NAMES.get(format, format)}\n{short}" for format, _, short in _INPUT_COLUMNS)])
    _add_numbers(table, ["ratio", "kur-\ntosis"])
    for kind, same in kinds.items():
        columns = [_spread(site.felt(name, format) for site in same) for format, name, _ in _INPUT_COLUMNS]
        ratios = [site.channels.ratio for site in same if site.channels and site.channels.ratio is not None]
        kurtoses = [site.kurtosis for site in same if site.kurtosis is not None]
        table.add_row(
            Text(kind),
            str(len(same)),
            *(_pair(column) for column in columns),
            _short(max(ratios, default=None)),
            _short(max(kurtoses, default=None)),
        )
    say.table(table)
    chosen = list(sites) if all_layers else sorted(sites, key=_token_db)[:WORST]
    title = "Every input" if all_layers else f"The {len(chosen)} inputs that lose most at int8 per_token"
    table = _table(f"{title}: felt SQNR in dB", say.lines)
    table.add_column("input of", overflow="fold")
    _add_numbers(table, ["int8\ntensor", "int8\ntoken", "int8\nchannel*", "absmax", "ratio", "out-\nliers"])
    table.add_column("which", no_wrap=True)
    for site in chosen:
        channels = site.channels
        table.add_row(
            Text(site.module),
            *(_db(site.felt(name, "int8")) for name in ("per_tensor", "per_token", "per_channel")),
            _short(site.absmax),
            _short(channels.ratio if channels else None),
            str(channels.outliers) if channels else "-",
            _which(channels) if channels else "",
        )
    say.table(table)
    say.line(
        "channel*: a scale for each input feature. It cannot leave the sum over the features, so no engine runs it; it "
        "is what smoothing could reach. tensor: static, from the same windows. token, group: dynamic. "
        "+2: two more layers read the same input. felt: each feature counts as much as the weights that read it. "
        f"outliers: features with an absmax above {OUTLIER_RATIO:g} x the median.",
        "dim",
    )


def _which(channels: ChannelRanges) -> str:
    """Indices of the largest outlier channels."""
    shown = [str(top.index) for top in channels.top[: min(3, channels.outliers)]]
    return " ".join(shown) + (" .." if channels.outliers > 3 else "")


def _token_db(site: ActivationInspection) -> float:
    value = site.felt("per_token", "int8")
    return math.inf if value is None else value


def _recommendation(inspection: Inspection) -> list[str]:
    summary, tolerance = inspection.summary, inspection.tolerance_db
    sound = [layer for layer in inspection.layers if layer.losses]
    texts = [f"Coarsest granularity that loses less than {tolerance:g} dB against the best of its width:"]
    for format in FORMATS:
        counts = summary.recommended[format]
        if not counts:
            continue
        most = max(counts, key=lambda name: counts[name])
        texts.append(f"  {format}: {most} for {counts[most]} of {len(sound)} layers")
        for name in counts:
            if name != most:
                those = [layer for layer in sound if layer.recommended[format] == name]
                texts.append(f"        {name} for {counts[name]}: {_where(those)}")
    if summary.column_bound:
        some = [layer for layer in sound if layer.module in set(summary.column_bound)]
        texts.append(
            f"Large input channels (int4 gains more than {tolerance:g} dB with a scale for each): {_where(some)}"
        )
        texts.append("  scaling inputs against weights (AWQ, SmoothQuant) evens these out")
    sites = _joined(inspection.activations or ())
    gains = [((site.felt("per_channel", "int8") or 0) - (site.felt("per_token", "int8") or 0), site) for site in sites]
    gains = [(gain, site) for gain, site in gains if gain > tolerance]
    if gains:
        most_gain, where = max(gains, key=lambda pair: pair[0])
        texts.append(
            f"Smoothing could gain more than {tolerance:g} dB at int8 per_token in {len(gains)} of {len(sites)} "
            f"inputs, most in {where.module}: {most_gain:.1f} dB"
        )
    if summary.dead_outputs or summary.dead_inputs:
        texts.append(f"All zero: {summary.dead_outputs} output and {summary.dead_inputs} input channels")
    return texts


def _where(layers: Sequence[LayerInspection]) -> str:
    """ "mlp.down_proj in blocks 0-2, 5; lm_head", as far as 6 kinds."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for layer in layers:
        kinds[layer.kind].extend([] if layer.block is None else [layer.block])
    texts = [f"{kind} in {_blocks(blocks)}" if blocks else kind for kind, blocks in kinds.items()]
    return "; ".join(texts[:6]) + (f" and {len(texts) - 6} more kinds" if len(texts) > 6 else "")


def _blocks(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{'blocks' if len(set(numbers)) > 1 else 'block'} {', '.join(texts)}"


def _spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Median and smallest."""
    known = sorted(value for value in values if value is not None)
    return (known[(len(known) - 1) // 2], known[0]) if known else None


def _pair(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{_db(pair[0])} {_db(pair[1])}"


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "exact"


_SCALES: tuple[tuple[float, str], ...] = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def _count(number: int) -> str:
    return next((f"{number / size:.3g} {unit}" for size, unit in _SCALES if number >= size), str(number))


def _short(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "-"
    write: Callable[[float], str] = "{:.0f}".format if abs(value) >= 100 else "{:.1f}".format
    return write(value) if abs(value) < 10000 and (abs(value) >= 0.1 or value == 0) else f"{value:.1g}"
