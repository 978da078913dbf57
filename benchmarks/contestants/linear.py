"""y = x W^T of one shape, as every library has it: requests of `serve` about linear layers.

Weights are many copies that take turns, as the layers of a model do, so that they come from memory and not from a
cache. A run is one product with each copy.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

MOST_COPIES = 96
LONG_SECONDS = 0.1
"""A run so long needs no other one to warm up."""


@dataclass(frozen=True)
class Shape:
    """W [n, k], and how many bytes of weights take turns."""

    k: int
    n: int
    rotate: int

    def copies(self, nbytes: float) -> int:
        """Of a weight of `nbytes`: at least two."""
        return max(2, min(MOST_COPIES, int(self.rotate // nbytes)))


@dataclass(frozen=True)
class Ready:
    """Weights in place: `bind(m)` gives a run of `copies` products with m rows, each of which reads `nbytes`."""

    bind: Callable[[int], Callable[[], object]]
    copies: int
    nbytes: float


class LinearService:
    """`makers`: how each contestant of this library is made; the names say its weights and inputs."""

    packages: tuple[str, ...] = ()
    makers: Mapping[str, Callable[[Shape], Ready]]

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.weights: dict[tuple[str, Shape], Ready] = {}
        self.runs: dict[str, tuple[Callable[[], object], int]] = {}
        self.took: dict[str, float] = {}  # the last run

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}

    def names(self) -> list[str]:
        """Of this library's contestants."""
        return list(self.makers)

    def make(self, name: str, k: int, n: int, m: int, rotate: int) -> dict[str, float]:
        """Prepare a contestant for m rows and run it once; weights stay until `free`."""
        shape = Shape(k, n, rotate)
        ready = self.weights.get((name, shape)) or self.makers[name](shape)
        self.weights[name, shape] = ready
        run = ready.bind(m)
        run()
        self.runs[name], self.took[name] = (run, ready.copies), 0.0
        return {"copies": ready.copies, "nbytes": ready.nbytes}

    def time(self, name: str, seconds: float) -> float:
        """Seconds of one product: runs for `seconds` or longer, after one run to warm up where runs are short."""
        run, copies = self.runs[name]
        if self.took[name] < LONG_SECONDS:
            run()
        runs, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds or not runs:
            run()
            runs += 1
        self.took[name] = took / runs
        return took / (runs * copies)

    def free(self) -> None:
        """Forget all contestants."""
        self.runs.clear()
        self.weights.clear()
        gc.collect()
