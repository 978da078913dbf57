"""How large the input channels of a block's matrices are, as transforms ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitgrain.pipeline.blockwise.stages import Stage


@dataclass(frozen=True)
class Sizes:
    """Smallest and largest x, and mean of |x| (at first their sum), of each input channel [in] or [experts, in]."""

    low: Tensor
    high: Tensor
    mean: Tensor

    @property
    def absmax(self) -> Tensor:
        """Largest |x|."""
        return torch.maximum(-self.low, self.high)

    def joined(self, other: Sizes) -> Sizes:
        """Those of both, `mean` being sums."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Sizes(low, high, self.mean + other.mean)


def sizes_of_stage(
    stage: Stage, sizes: Mapping[tuple[str, int | None], Sizes], block: nn.Module
) -> Iterator[tuple[str, Sizes]]:
    """For each matrix of a stage of `block`, what was found by (matrix, expert); 0 for experts never reached."""
    for name in stage.names:
        parameter = block.get_parameter(name)
        source = stage.names[0] if stage.shared else name
        if parameter.ndim < 3:
            if (source, None) in sizes:
                yield name, sizes[source, None]
            continue
        found = [sizes.get((name, i)) for i in range(len(parameter))]
        known = next((one for one in found if one is not None), None)
        if known is not None:
            blank = Sizes(*(torch.zeros_like(known.low) for _ in range(3)))
            filled = [one or blank for one in found]
            stacks = zip(*((one.low, one.high, one.mean) for one in filled), strict=True)
            yield name, Sizes(*(torch.stack(stack) for stack in stacks))


class Measured:
    """Computed when it is first asked for."""

    def __init__(self, measure: Callable[[], dict[str, Sizes]]) -> None:
        self._measure = measure
        self._found: dict[str, Sizes] | None = None

    def get(self) -> dict[str, Sizes]:
        if self._found is None:
            self._found = self._measure()
        return self._found


class Part(Mapping[str, Tensor]):
    """One of the figures of each input."""

    def __init__(self, measured: Measured, figure: str) -> None:
        self._measured, self._figure = measured, figure

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self._measured.get()[key], self._figure)

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured.get())

    def __len__(self) -> int:
        return len(self._measured.get())
