"""Static scales of the inputs of one stage, from what the calibration batches show before its moments are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitgrain.calibration.static_inputs import search_input, token_counts
from bitgrain.calibration.statistics import Accumulator, LayerStatistics, merge
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError, StatisticsError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.clusters import Clusters
from bitgrain.numerics.observers import StaticInput, keeps_histogram, static_input
from bitgrain.numerics.ranges import OutputSearch, Range
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage, leaf_of
from bitgrain.pipeline.layers import matrices
from bitgrain.runtime.watch import Key

ROWS = 2048
"""Tokens, drawn from all batches, by which `search` compares scales."""
_MATRICES = 4
"""Of a stack of experts, by whose outputs `search` compares."""


@dataclass(frozen=True)
class Chosen:
    """The static scale of a layer's inputs. error: of `search`, what it changes in the outputs, relative to them."""

    static: StaticInput
    error: float | None = None

    @property
    def record(self) -> dict[str, float]:
        """For the manifest; of inputs in clusters the largest scale."""
        error = {} if self.error is None else {"input_error": self.error}
        return {"input_scale": float(self.static.scale.to(torch.float32).max()), **error}


def static_layers(layers: Mapping[str, StoredLayer], names: Iterable[str]) -> list[str]:
    """Those of the tensors `names` whose inputs have static scales."""
    return [name for name in names if layers[name].static_input is not None]


def require_reached(names: Sequence[str]) -> None:
    """Raises PlanError if there are layers with static inputs among those that calibration never reaches."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        module = names[0].removesuffix(".weight")
        raise PlanError(
            f"{module}{more}: the calibration text never reaches it, so its inputs can have no static scale; keep it "
            f"(--keep {module}), or choose a scheme with dynamic activations"
        )


def stored_inputs(layer: StoredLayer, chosen: Mapping[str, Chosen]) -> list[StaticInput]:
    """What `Layout.encode` wants for a layer: its scale for each stacked matrix; none where inputs are not static."""
    return [] if layer.static_input is None else [chosen[layer.tensor].static] * layer.experts


Observing = tuple[
    Stage,
    Mapping[str, StoredLayer],
    Mapping[str, str],
    Callable[[int], Seen],
    Sequence[int],
    Callable[[str], Tensor],
    Pool,
    str,
]
"""The arguments of `choose_inputs`."""


@dataclass(frozen=True)
class Wanted:
    """What is to be kept of a stage's inputs.

    places     Key -> the names under which its inputs are counted; several keys may have one
    histogram  names that need a histogram; sampled: names of which rows are kept
    clusters   names -> clusters of channels that are counted apart too, each under its `cluster_name`
    """

    places: Callable[[Key], Sequence[str]]
    histogram: Callable[[str], bool]
    sampled: Callable[[str], bool]
    clusters: Mapping[str, Clusters] = field(default_factory=dict)


Observed = dict[str, tuple[Accumulator, list[Tensor]]]
"""Sums and sampled rows, by name."""


def observe_inputs(
    stage: Stage, seen: Seen, wanted: Wanted, batch: int, windows: Sequence[int], label: str
) -> Observed:
    """What one batch shows; `windows`: how many each batch holds. Raises NumericsError for NaN and Inf."""
    parts: dict[str, list[Tensor]] = {}
    for key, x in seen.inputs.items():
        for name in wanted.places(key) if len(x) else ():
            parts.setdefault(name, []).append(x)
    found: Observed = {}
    for name, tensors in parts.items():
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        pieces = {name: whole}
        if name in wanted.clusters:
            runs = whole.split(wanted.clusters[name].sizes, -1)
            pieces |= {cluster_name(name, place): run for place, run in enumerate(runs)}
        for key, x in pieces.items():
            sums = Accumulator(x.shape[-1], f"{label}.{name}", hessian=False, histogram=wanted.histogram(name))
            by_window = stage.shared and len(x) % windows[batch] == 0
            sums.update(x.reshape(windows[batch], -1, x.shape[-1]) if by_window else x)
            share = -(-ROWS // len(windows))
            found[key] = (sums, [_drawn(x, share, batch)] if wanted.sampled(name) else [])
    return found


def cluster_name(name: str, place: int) -> str:
    """Under which one cluster of the inputs `name` is counted."""
    return f"{name}[cluster {place}]"


def merge_observed(batches: Iterable[Observed]) -> dict[str, LayerStatistics]:
    """All batches, in their order."""
    totals: Observed = {}
    for found in batches:
        for name, (sums, rows) in found.items():
            if name in totals:
                merge(totals[name][0], sums)
                totals[name][1].extend(rows)
            else:
                totals[name] = (sums, rows)
    return {
        name: replace(sums.finish(), rows=torch.cat(rows) if rows else None) for name, (sums, rows) in totals.items()
    }


def choose_inputs(
    stage: Stage,
    layers: Mapping[str, StoredLayer],
    parameters: Mapping[str, str],
    seen: Callable[[int], Seen],
    windows: Sequence[int],
    original: Callable[[str], Tensor],
    pool: Pool,
    label: str,
    clusters: Mapping[str, Clusters] | None = None,
) -> dict[str, Chosen]:
    """A scale for each layer of a stage whose inputs are static, by original tensor name.

    parameters  tensor -> the parameter as which the stage knows it; windows: how many each batch holds
    seen        batch -> its inputs, not rounded; original: a weight as it will be rounded, as on disk
    clusters    parameter -> the clusters of its inputs' channels, where its spec has some
    Raises PlanError for a layer that no token reached, NumericsError for NaN and Inf, naming the layer.
    """
    names = [name for name in static_layers(layers, layers) if parameters[name] in stage.names]
    if not names:
        return {}
    group_of = {name: group_name(stage, parameters[name]) for name in names}
    ranges: dict[str, list[Range]] = {}
    for name in names:
        ranges.setdefault(group_of[name], []).append(static_spec(layers[name]).range)
    of_group: dict[str, Clusters] = {}
    for name in names:
        if static_spec(layers[name]).clusters:  # readers of one input have one order; the fewest clusters do for all
            known = (of_group.get(group_of[name]), (clusters or {})[parameters[name]])
            of_group[group_of[name]] = min((one for one in known if one), key=lambda one: len(one.sizes))
    wanted = Wanted(
        places=lambda key: [one for one in [group_name(stage, key.name)] if one in ranges],
        histogram=lambda group: any(keeps_histogram(one) for one in ranges[group]),
        sampled=lambda group: any(isinstance(one, OutputSearch) for one in ranges[group]),
        clusters=of_group,
    )
    batches = range(len(windows))
    groups = merge_observed(
        pool.map(lambda batch: observe_inputs(stage, seen(batch), wanted, batch, windows, label), batches)
    )
    require_reached([name for name in names if group_of[name] not in groups])
    found: dict[str, Chosen] = {}
    for name in names:
        if name not in found:
            sharers = [other for other in names if group_of[other] == group_of[name]]
            sharers = [other for other in sharers if static_spec(layers[other]) == static_spec(layers[name])]
            group = group_of[name]
            if static_spec(layers[name]).clusters:
                chosen = _choose_clusters(groups, group, of_group[group], sharers, layers, original)
            else:
                chosen = choose_input(groups[group], sharers, layers, original)
            found.update(dict.fromkeys(sharers, chosen))
    return found


def _choose_clusters(
    groups: Mapping[str, LayerStatistics],
    group: str,
    clusters: Clusters,
    sharers: Sequence[str],
    layers: Mapping[str, StoredLayer],
    original: Callable[[str], Tensor],
) -> Chosen:
    """`choose_input` for each cluster of channels as if the others were not rounded."""
    rows = groups[group].rows
    counts = None if rows is None else token_counts(rows, _some_matrices(sharers, layers, original))
    parts: list[StaticInput] = []
    start = 0
    for place, size in enumerate(clusters.sizes):
        statistics, columns = groups[cluster_name(group, place)], slice(start, start + size)
        parts.append(choose_input(statistics, sharers, layers, original, columns, counts).static)
        start += size
    return Chosen(StaticInput.of_clusters(parts, clusters, static_spec(layers[sharers[0]]).clusters))


def choose_input(
    statistics: LayerStatistics,
    sharers: Sequence[str],
    layers: Mapping[str, StoredLayer],
    original: Callable[[str], Tensor],
    columns: slice = slice(None),
    counts: Tensor | None = None,
) -> Chosen:
    """The scale of the layers `sharers`, which read the same inputs and have the same spec; `columns`: of their
    matrices, those that the statistics are of; `counts`: how much each of the sampled rows counts.

    Raises StatisticsError for range search without sampled rows, SchemeError for a range without its histogram.
    """
    layer = layers[sharers[0]]
    spec = replace(static_spec(layer), clusters=0)
    if not isinstance(spec.range, OutputSearch):
        return Chosen(static_input(statistics.observed(spec.range), spec, layer.module))
    if statistics.rows is None:
        raise StatisticsError(
            f"{layer.module}: these statistics hold no sample of its inputs, which range search needs"
        )
    low, high = float(statistics.ends[:, 0].amin()), float(statistics.ends[:, 1].amax())
    weights = [weight[:, columns] for weight in _some_matrices(sharers, layers, original)]
    found = search_input(statistics.rows, weights, spec, low=low, high=high, counts=counts, name=layer.module)
    return Chosen(*found)


def static_spec(layer: StoredLayer) -> QuantSpec:
    """Of a layer that is known to have static inputs."""
    assert layer.static_input is not None
    return layer.static_input


def _some_matrices(
    names: Sequence[str], layers: Mapping[str, StoredLayer], original: Callable[[str], Tensor]
) -> list[Tensor]:
    """The matrices that read one tensor; of experts, which each read their own tokens, the first few."""
    found: list[Tensor] = []
    for name in names:
        few = layers[name].role == "expert"
        for matrix in matrices(original(name), layers[name]):
            if few and len(found) >= _MATRICES:
                return found
            found.append(matrix.to(torch.float32))
    return found


def group_name(stage: Stage, parameter: str) -> str:
    """Matrices of a stage with one name have one scale: they read one tensor, or are experts that engines join."""
    return stage.names[0] if stage.shared else leaf_of(parameter)


def _drawn(x: Tensor, count: int, batch: int) -> Tensor:
    """`count` of the rows of x [tokens, in], the same in every run."""
    if len(x) <= count:
        return x.clone()
    generator = torch.Generator().manual_seed(batch)
    places = torch.randperm(len(x), generator=generator)[:count].sort().values
    return x[places.to(x.device)]
