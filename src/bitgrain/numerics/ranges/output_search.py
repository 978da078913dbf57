"""Search by the layer's outputs: for static input scales only."""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.numerics.ranges.minmax import MinMax


@dataclass(frozen=True)
class OutputSearch(MinMax):
    """The limits of a static input under which the layer's output changes least (`calibration.static_inputs`).

    That needs the layer's weights and inputs themselves; of numbers alone it sees the outer limits, from which the
    search starts.
    """

    name = "search"
