"""Which columns weights keep in 16 bits, from what the calibration batches show before the inputs are rounded.

Matrices that read one tensor keep the same ones where they are chosen by activation, and so do experts that engines run
as one: their inputs have one quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bitgrain.calibration.statistics import LayerStatistics
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.errors import PlanError
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.runs import Seen
from bitgrain.pipeline.blockwise.stages import Stage
from bitgrain.pipeline.blockwise.static import Wanted, group_name, merge_observed, observe_inputs
from bitgrain.pipeline.layers import matrices


def keeping_layers(layers: Mapping[str, StoredLayer]) -> list[str]:
    """Those that keep columns, by original tensor name."""
    return [name for name, layer in layers.items() if layer.scheme.weight.columns is not None]


def needs_inputs(layer: StoredLayer) -> bool:
    """Whether only the inputs of `layer` tell which columns it keeps."""
    choice = layer.scheme.weight.columns
    return choice is not None and choice.needs_inputs


def choose_columns(
    stage: Stage,
    layers: Mapping[str, StoredLayer],
    parameters: Mapping[str, str],
    seen: Callable[[int], Seen],
    windows: Sequence[int],
    original: Callable[[str], Tensor],
    pool: Pool,
    label: str,
) -> dict[str, list[Tensor]]:
    """For each layer of a stage that keeps columns, which: int32 [k] for each stacked matrix, by original tensor name.

    Arguments and errors are those of `static.choose_inputs`.
    """
    names = [name for name in keeping_layers(layers) if parameters[name] in stage.names]
    group_of = {name: group_name(stage, parameters[name]) for name in names if needs_inputs(layers[name])}
    groups: dict[str, LayerStatistics] = {}
    if group_of:
        wanted = Wanted(
            places=lambda key: [one for one in [group_name(stage, key.name)] if one in group_of.values()],
            histogram=lambda _: False,
            sampled=lambda _: False,
        )
        batches = range(len(windows))
        groups = merge_observed(
            pool.map(lambda batch: observe_inputs(stage, seen(batch), wanted, batch, windows, label), batches)
        )
    return {name: columns_of(layers[name], original(name), groups.get(group_of.get(name, ""))) for name in names}


def columns_of(layer: StoredLayer, original: Tensor, statistics: LayerStatistics | None = None) -> list[Tensor]:
    """The columns that each matrix of a layer keeps; empty if it keeps none.

    original    the weight as it will be rounded, as on disk; statistics: of its inputs
    Raises PlanError for columns by activation without statistics.
    """
    choice = layer.scheme.weight.columns
    if choice is None:
        return []
    if choice.needs_inputs and statistics is None:
        raise PlanError(
            f"{layer.module}: the calibration text never reaches it, so its columns cannot be chosen by activation; "
            f"keep it (--keep {layer.module}), or choose columns by weight"
        )
    magnitude = None if statistics is None else statistics.mean_abs
    return [choice.choose(matrix, magnitude, layer.tensor) for matrix in matrices(original, layer)]
