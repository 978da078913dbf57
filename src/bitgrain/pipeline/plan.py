"""The plan: everything that `quantize` will do, known before a weight is touched (`planning` makes it).

It holds every tensor of the output with its place in the files, so the sizes that it predicts are the sizes that are
written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PretrainedConfig

from bitgrain.calibration.statistics_file import StatisticsFile
from bitgrain.calibration.windows import CalibrationText
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.reader import Checkpoint
from bitgrain.checkpoints.shards import ShardLayout, weights_nbytes
from bitgrain.errors import PlanError
from bitgrain.models.anatomy import Anatomy, Weight
from bitgrain.models.source import ModelSource
from bitgrain.numerics.formats import FP4_E2M1
from bitgrain.numerics.ranges import MinMax
from bitgrain.pipeline.cache_plan import CachePlan
from bitgrain.pipeline.cost import calibrated_peak, saved_peak
from bitgrain.pipeline.engines import Verdict
from bitgrain.recipes import Recipe

CACHE_UNIT = "scales of keys and values"
_LIBRARY_BYTES = 180_000_000
"""The modelling code of transformers and what it imports, which comes in with the first model."""
_WORKER_BYTES = 92_000_000
"""One worker's pieces of a matrix, widened to float32 and float64, and what its allocator keeps: of the GNU C library a
heap of 64 MiB for each thread, of which it gives back nothing that lies below a small block in use."""
_TILE_BYTES = 80
"""For each element of one row of tiles, the least that is rounded at once."""
_PACKING_BYTES = {"compressed-tensors": 2, "bitgrain": 2}
"""For each element of one matrix while its codes are packed."""
_TURNED_BYTES = 3
"""The same in layouts that pack along the outputs, or turn what is packed."""


@dataclass(frozen=True)
class PlannedLayer:
    """One matrix, or stack of matrices, of the checkpoint and what becomes of it."""

    weight: Weight
    layer: StoredLayer | None
    """None: kept as it is."""
    note: str = ""
    """Why it gets something else than the recipe's scheme."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are read, worked on and committed together."""

    name: str
    tensors: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """See the module. `problems` is empty in a plan that can be carried out."""

    source: ModelSource
    config: PretrainedConfig
    checkpoint: Checkpoint
    anatomy: Anatomy
    recipe: Recipe
    layers: tuple[PlannedLayer, ...]
    layout: Layout
    shards: tuple[ShardLayout, ...]
    units: tuple[Unit, ...]
    engines: tuple[Verdict, ...]
    workers: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trust_remote_code: bool = field(default=False)
    calibration: CalibrationText | None = field(default=None)
    """The text that is shown to the model; None: nothing in the recipe needs any."""
    training: CalibrationText | None = field(default=None)
    """The text that is trained on; None: nothing is trained."""
    statistics: StatisticsFile | None = field(default=None)
    """What was saved of such a pass, used in place of text."""
    cache: CachePlan | None = field(default=None)
    """Keys and values that get static scales; None: the recipe asks for none."""

    @cached_property
    def quantized(self) -> dict[str, StoredLayer]:
        """The quantized layers by the name of their original tensor."""
        return {planned.weight.tensor: planned.layer for planned in self.layers if planned.layer is not None}

    @cached_property
    def fused_groups(self) -> dict[str, str]:
        """The fused group of each tensor that belongs to one."""
        return {planned.weight.tensor: planned.weight.fused for planned in self.layers if planned.weight.fused}

    @property
    def bytes_before(self) -> int:
        """Of all tensors in the source."""
        return sum(entry.nbytes for entry in self.checkpoint.entries.values())

    @property
    def bytes_after(self) -> int:
        """Of all weight files, with their headers and index."""
        return weights_nbytes(self.shards)

    @cached_property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each weight that is quantized; 0 if none is."""
        elements = sum(layer.elements for layer in self.quantized.values())
        bits = 8 * sum(t.nbytes for layer in self.quantized.values() for t in self.layout.tensors(layer))
        return bits / elements if elements else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits for each parameter of the whole model."""
        total = sum(self.anatomy.sizes.values())
        return 8 * sum(placed.spec.nbytes for shard in self.shards for placed in shard.tensors) / total

    @property
    def peak_ram(self) -> int:
        """An upper bound of the bytes that the job holds at once, above Python with torch and transformers imported."""
        largest = sorted((self._unit_ram(unit) for unit in self.units), reverse=True)[: self.workers]
        writing = sum(nbytes + _WORKER_BYTES for nbytes in largest)
        if self.statistics is not None:
            return _LIBRARY_BYTES + writing + saved_peak(self)
        return _LIBRARY_BYTES + (writing if self.calibration is None else max(writing, calibrated_peak(self)))

    def _unit_ram(self, unit: Unit) -> int:
        """The most that a unit's tensors take at once: results stay until the unit is written, originals do not."""
        held = peak = 0
        for name in unit.tensors:
            original = self.checkpoint.entries[name].nbytes
            layer = self.quantized.get(name)
            if layer is None:
                held += original
                peak = max(peak, held)
                continue
            spec = layer.scheme.weight
            matrix = layer.elements // layer.experts
            tensors = self.layout.tensors(layer)
            result = sum(tensor.nbytes for tensor in tensors)
            rounding = original + (original // layer.experts if layer.transposed else 0)
            rounding += _TILE_BYTES * min(spec.granularity.rows or 1, layer.out_features) * layer.in_features
            if spec.granularity.rows is None and type(spec.range) is not MinMax:
                rounding += 8 * matrix  # the range looks at the whole matrix in float32
            if spec.outliers:
                rounding += 32 * matrix  # they are sought in the whole matrix
            if spec.columns:
                rounding += original // layer.experts  # without them
            if any(tensor.name == name for tensor in tensors):  # the codes are stored as they are
                coded, packing = result, 0
            else:
                coded = layer.elements * spec.format.code_dtype.itemsize + result
                packing = _PACKING_BYTES.get(self.layout.name, _TURNED_BYTES) * matrix + (
                    result if layer.experts > 1 else 0
                )
            peak = max(peak, held + coded + max(rounding, packing))
            held += result
        return peak

    @property
    def decodes_to_bfloat16(self) -> bool:
        """FP4 weights and activations in a float32 model: engines run it in bfloat16 only."""
        return needs_bfloat16(self.quantized.values())

    def coverage(self) -> dict[str, int]:
        """Number of parameters that each scheme covers; "kept" is everything else."""
        count = Counter[str]()
        for planned in self.layers:
            if planned.layer is not None:
                count[planned.layer.scheme.name] += planned.layer.elements
        covered = count.total()
        ordered = dict(count.most_common())
        return {**ordered, "kept": sum(self.anatomy.sizes.values()) - covered}

    def require_possible(self) -> None:
        """Raises PlanError that lists every problem."""
        if self.problems:
            raise PlanError("this cannot be done as asked:\n  " + "\n  ".join(self.problems))


def needs_bfloat16(layers: Iterable[StoredLayer]) -> bool:
    """Whether engines run it in bfloat16 only: FP4 weights and activations in a float32 model."""
    return any(
        x.scheme.weight.format == FP4_E2M1 and x.scheme.input is not None and x.dtype == torch.float32 for x in layers
    )
