"""Static scales of the inputs of one stage, from what the calibration batches show before its moments are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitgrain.calibration.static_inputs import search_input
from bitgrain.calibration.statistics import Accumulator, merge
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.observers import StaticInput, keeps_histogram, static_input
from bitgrain.numerics.ranges import OutputSearch
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage, leaf_of
from bitgrain.pipeline.layers import matrices

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
        """For the manifest."""
        error = {} if self.error is None else {"input_error": self.error}
        return {"input_scale": float(self.static.scale), **error}


@dataclass
class _Group:
    """Matrices that have one scale: they read one tensor, or they are experts that engines run as one."""

    accumulator: Accumulator
    rows: list[Tensor] = field(default_factory=list)


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
    if layer.static_input is None:
        return []
    static = chosen[layer.tensor].static
    zero = None if static.zero is None else static.zero.clone()
    return [StaticInput(static.scale.clone(), zero)] * layer.experts  # files hold no tensor twice


def choose_inputs(
    stage: Stage,
    layers: Mapping[str, StoredLayer],
    parameters: Mapping[str, str],
    seen: Callable[[int], Seen],
    windows: Sequence[int],
    original: Callable[[str], Tensor],
    pool: Pool,
    label: str,
) -> dict[str, Chosen]:
    """A scale for each layer of a stage whose inputs are static, by original tensor name.

    parameters  tensor -> the parameter as which the stage knows it; windows: how many each batch holds
    seen        batch -> its inputs, not rounded; original: a weight as it will be rounded, as on disk
    Raises PlanError for a layer that no token reached, NumericsError for NaN and Inf, naming the layer.
    """
    names = [name for name in static_layers(layers, layers) if parameters[name] in stage.names]
    if not names:
        return {}
    specs = {name: spec for name in names if (spec := layers[name].static_input) is not None}
    group_of = {name: _group(stage, parameters[name]) for name in names}
    ranges = {group: [specs[name].range for name in names if group_of[name] == group] for group in group_of.values()}
    histogram = {group: any(keeps_histogram(one) for one in used) for group, used in ranges.items()}
    searched = {group for group, used in ranges.items() if any(isinstance(one, OutputSearch) for one in used)}
    share = -(-ROWS // len(windows))

    def one(batch: int) -> dict[str, _Group]:
        found: dict[str, _Group] = {}
        parts: dict[str, list[Tensor]] = {}
        for key, x in seen(batch).inputs.items():
            name = _group(stage, key.name)
            if name in histogram and len(x):
                parts.setdefault(name, []).append(x)
        for name, tensors in parts.items():
            x = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            sums = Accumulator(x.shape[-1], f"{label}.{name}", hessian=False, histogram=histogram[name])
            by_window = stage.shared and len(x) % windows[batch] == 0
            sums.update(x.reshape(windows[batch], -1, x.shape[-1]) if by_window else x)
            found[name] = _Group(sums, [_drawn(x, share, batch)] if name in searched else [])
        return found

    groups: dict[str, _Group] = {}
    for found in pool.map(one, range(len(windows))):
        for name, group in found.items():
            if name in groups:
                merge(groups[name].accumulator, group.accumulator)
                groups[name].rows += group.rows
            else:
                groups[name] = group
    require_reached([name for name in names if group_of[name] not in groups])
    return _scales(names, specs, group_of, groups, layers, original)


def _scales(
    names: Sequence[str],
    specs: Mapping[str, QuantSpec],
    group_of: Mapping[str, str],
    groups: Mapping[str, _Group],
    layers: Mapping[str, StoredLayer],
    original: Callable[[str], Tensor],
) -> dict[str, Chosen]:
    statistics = {name: group.accumulator.finish() for name, group in groups.items()}
    found: dict[str, Chosen] = {}
    for name in names:
        if name in found:
            continue
        spec, group = specs[name], group_of[name]
        sharers = [other for other in names if group_of[other] == group and specs[other] == spec]
        module = layers[name].module
        if isinstance(spec.range, OutputSearch):
            x, ends = torch.cat(groups[group].rows), statistics[group].ends
            low, high = float(ends.amin()), float(ends.amax())
            weights = _some_matrices(sharers, layers, original)
            chosen = Chosen(*search_input(x, weights, spec, low=low, high=high, name=module))
        else:
            chosen = Chosen(static_input(statistics[group].observed(spec.range), spec, module))
        found.update(dict.fromkeys(sharers, chosen))
    return found


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


def _group(stage: Stage, parameter: str) -> str:
    return stage.names[0] if stage.shared else leaf_of(parameter)


def _drawn(x: Tensor, count: int, batch: int) -> Tensor:
    """`count` of the rows of x [tokens, in], the same in every run."""
    if len(x) <= count:
        return x.clone()
    generator = torch.Generator().manual_seed(batch)
    places = torch.randperm(len(x), generator=generator)[:count].sort().values
    return x[places.to(x.device)]
