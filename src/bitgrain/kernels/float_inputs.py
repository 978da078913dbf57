"""How inputs are rounded to a float format of a few bits before they meet packed weights (`kernels.code_linear`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitgrain.errors import KernelError

InputScale = Literal["fixed", "float32", "e8m0", "e4m3"]
KINDS: dict[InputScale, int] = {"fixed": 1, "float32": 2, "e8m0": 3, "e4m3": 4}
"""As native/linear/code_weights.h numbers them."""


@dataclass(frozen=True)
class Grid:
    """A float format with an exponent of its own for each number.

    mantissa_bits  without the leading one
    least          the smallest normal number
    largest        the largest number; overflow: halfway from it to what would be the next
    """

    mantissa_bits: int
    least: float
    largest: float
    overflow: float


FORMATS = {
    "fp8_e4m3": Grid(3, 2.0**-6, 448.0, 464.0),
    "fp8_e5m2": Grid(2, 2.0**-14, 57344.0, 61440.0),
    "fp4_e2m1": Grid(1, 1.0, 6.0, 7.0),
}
"""OCP FP8 and the elements of OCP Microscaling Formats."""


@dataclass(frozen=True)
class FloatInputs:
    """x is rounded to v = round(x / scale), ties to even, beyond the format's ends to these; products are made with v.

    format  a key of FORMATS
    scale   "fixed": `outer`; else from the largest magnitude: "float32": that / the format's largest number; "e8m0":
            the smallest power of two under which none rounds past that number (MX); "e4m3": the first as a number of
            E4M3 times `outer` (NVFP4)
    groups  whether each group of the weight's inputs has a scale, else each row
    Raises KernelError for an unknown format or a scale that is not positive.
    """

    format: str
    scale: InputScale = "float32"
    groups: bool = False
    outer: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.scale not in KINDS:
            raise KernelError(f"inputs are rounded to {', '.join(FORMATS)}, not to {self.format} with {self.scale}")
        if not self.outer > 0:
            raise KernelError(f"the scale of inputs is {self.outer}: it has to be positive")

    @property
    def grid(self) -> Grid:
        return FORMATS[self.format]

    def arguments(self) -> tuple[int, int, float, float, float, float, bool]:
        """What the native module takes."""
        grid = self.grid
        numbers = (grid.least, grid.largest, grid.overflow, self.outer)
        return KINDS[self.scale], grid.mantissa_bits, *numbers, self.groups
