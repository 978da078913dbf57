"""Moving average: static activation limits follow the exponential moving average of each batch's min and max.

Jacob et al., arXiv 1712.05877, section 3.1 (ranges of activations are smoothed by an exponential moving average).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.errors import SchemeError
from bitgrain.numerics.ranges.minmax import MinMax


@dataclass(frozen=True)
class MovingAverage(MinMax):
    """limit = momentum * limit + (1 - momentum) * the batch's limit, from the first batch's limit on.

    It depends on the order of the batches and on how the data is cut into them. On a single tensor it is min-max.
    """

    momentum: float = 0.9
    name = "moving_average"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise SchemeError(f"moving_average: momentum lies in [0, 1), not {self.momentum}")
