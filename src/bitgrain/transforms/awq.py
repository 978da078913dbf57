"""AWQ (Lin et al., arXiv 2306.00978): weights of salient input channels scaled up, so that rounding hurts them less.

s = mean|x|^a / mean|w|^(1 - a), a from a grid, by the output error of the module that holds the readers
                                                                (equations 4 and 5; the division by mean|w| is the
                                                                "duo scaling" of its authors' later code)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.channels import input_size, quantized_readers, weight_mean
from bitgrain.transforms.proof import check_same, routes
from bitgrain.transforms.rescale import rescale, to_columns
from bitgrain.transforms.simulate import quantized
from bitgrain.transforms.smoothquant import check_kinds


@register_transform("awq")
@dataclass(frozen=True)
class Awq:
    """grid     number of factors tried for each pair, besides leaving it alone
    duo      "on": divide by the weights' mean; "off": s = mean|x|^a as in the paper; "both": half of the grid each
    pairs    "norm", "linear" or "all" (the authors')
    samples  calibration batches by which the error is measured
    """

    grid: int = 20
    duo: str = "both"
    pairs: str = "all"
    samples: int = 4
    whole_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.grid < 1 or self.samples < 1:
            raise SchemeError("awq: grid and samples are at least 1")
        if self.duo not in ("on", "off", "both"):
            raise SchemeError(f"awq: duo is on, off or both, not {self.duo!r}")
        check_kinds(self.pairs, "awq")

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Nothing: the authors scale inside the blocks."""
        del view
        return {}

    def apply(self, block: BlockView) -> dict[str, Any]:
        routed, largest = routes(block.module), 0.0
        exponents: dict[str, float | None] = {}
        gains: dict[str, float] = {}
        for pair in block.pairs:
            readers = quantized_readers(block, pair)
            mean_x = input_size(block, pair, dict(block.mean_abs), "mean")
            if self.pairs not in (pair.kind, "all") or not readers or mean_x is None:
                continue
            factors, exponent, gain = self._best(block, pair, readers, mean_x)
            exponents[pair.writer], gains[pair.writer] = exponent, gain
            if factors is None:
                continue
            before = block.run(0)
            rescale(block.module, pair, factors)
            difference = check_same(before, block.run(0), block.path, f"scaling {pair}", routed)
            largest = max(largest, difference)
        return {"exponent": exponents, "error": gains, "difference": largest}

    def _best(
        self, block: BlockView, pair: Pair, readers: list[str], mean_x: Tensor
    ) -> tuple[Tensor | None, float | None, float]:
        """(factors, exponent, their error relative to that without factors); None: best left alone."""
        mean_w = weight_mean(block, pair, readers)
        runs = _runs(block, readers, self.samples)
        wanted = [run() for run in runs]

        def error(factors: Tensor | None) -> float:
            columns = None if factors is None else to_columns(pair, factors)
            with quantized(block.module, pair, readers, block.specs, columns):
                return sum(float((run() - y).double().square().sum()) for run, y in zip(runs, wanted))

        alone = error(None)
        best: tuple[float, Tensor | None, float | None] = (alone, None, None)
        forms = [form for form, names in ((None, ("off", "both")), (mean_w, ("on", "both"))) if self.duo in names]
        steps = -(-self.grid // len(forms))
        for form in forms:
            for step in range(steps):
                exponent = step / steps
                factors = scaling(mean_x, form, exponent)
                found = error(factors)
                if found < best[0]:
                    best = (found, factors, exponent)
        return best[1], best[2], best[0] / alone if alone else 1.0


def scaling(mean_x: Tensor, mean_w: Tensor | None, exponent: float) -> Tensor:
    """Factors of the weights' channels, between their smallest and largest centred on 1."""
    factors = mean_x**exponent
    if mean_w is not None:
        factors = factors / (mean_w ** (1 - exponent) + 1e-4)
    factors = factors.clamp_min(1e-4)
    return factors / (factors.amax(-1, keepdim=True) * factors.amin(-1, keepdim=True)).sqrt()


def _runs(block: BlockView, readers: list[str], samples: int) -> list[Callable[[], Tensor]]:
    """For each sample, a run of the smallest module that holds all readers, on what it is given in the block."""
    parts = [name.split(".")[:-1] for name in readers]
    shared = next((i for i, column in enumerate(zip(*parts)) if len(set(column)) > 1), min(map(len, parts)))
    count = min(samples, block.samples)
    if shared == 0:
        return [lambda i=i: block.run(i) for i in range(count)]
    module = block.module.get_submodule(".".join(parts[0][:shared]))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for i in range(count):
            block.run(i)
    finally:
        handle.remove()

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            output = module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return [lambda call=call: run(*call) for call in calls]
