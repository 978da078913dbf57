"""How fast the native loops of quantization are, beside the same work in torch.

    make bench-solver-kernels                       # moments, GPTQ of one matrix, range searches; one and two threads
    make bench-solver-kernels ARGS="--only gram --threads 1"

Medians of a few repetitions, both sides in turn. The same inputs, the same thread count; what differs in the results is
measured, too: moments against float64, GPTQ's loss, the tiles whose range is another one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

from bitgrain.kernels.gram import add_gram, mirror
from bitgrain.kernels.native import isa, torch_only
from bitgrain.numerics.granularity import to_tiles
from bitgrain.numerics.ranges import MSE, Range, Weighted
from bitgrain.numerics.spec import int_weight, nf4_double_quantized
from bitgrain.solvers import Moments, linalg
from bitgrain.solvers import descend as loops
from bitgrain.solvers.gptq import GPTQ
from bitgrain.solvers.objective import row_errors
from bitgrain.solvers.steps import Lanes, Storage, fit

Run = dict[str, Any]


def medians(ours: Callable[[], Any], torchs: Callable[[], Any], repeat: int, warm: int = 1) -> tuple[float, float]:
    """Seconds of both, in turn, after `warm` runs of each that are not counted."""
    seconds: list[tuple[float, float]] = []
    for _ in range(repeat + warm):
        began = time.perf_counter()
        ours()
        between = time.perf_counter()
        with torch_only():
            torchs()
        seconds.append((between - began, time.perf_counter() - between))
    first, second = zip(*seconds[warm:], strict=True)
    return statistics.median(first), statistics.median(second)


def inputs(tokens: int, features: int) -> Tensor:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x


def bench_gram(repeat: int) -> Iterator[Run]:
    """H += X^T X of 512 tokens, as calibration adds them; torch as it is called without kernels."""
    for features in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x, h, other = inputs(512, features).to(dtype), *torch.zeros(2, features, features)
            ours, torchs = medians(lambda h=h, x=x: add_gram(h, x), lambda h=other, x=x: add_gram(h, x), repeat)
            some = x[:, :256].double()
            exact = some.T @ some
            root = exact.diagonal().sqrt()
            errors = [
                float((((one[:256, :256] / (repeat + 1)) - exact) / (root * root.unsqueeze(1))).abs().max())
                for one in (mirror(h), other)
            ]
            what = f"X^T X, {str(dtype).removeprefix('torch.')}, 512 x {features}"
            difference = f"error {errors[0]:.1e}, torch {errors[1]:.1e}"
            yield {"what": what, "seconds": ours, "torch_seconds": torchs, "difference": difference}


def bench_gptq(repeat: int, size: int) -> Iterator[Run]:
    """One matrix, int4 in groups of 128: the loop over columns, and all of GPTQ after the factor of H."""
    x, spec = inputs(2 * size, size), int_weight(4, 128)
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(1)) * 0.05
    moments = Moments(mirror(add_gram(torch.zeros(size, size), x)) / len(x), len(x))
    order = torch.argsort(moments.importance, descending=True, stable=True)
    factor = linalg.inverse_factor(moments.hessian, order=order)[0].t().contiguous()
    ideal = fit(weight, spec, spec.range, None)
    lanes = Lanes(spec, ideal[0].shape[1], size, weight.device)
    lanes.put(Storage.choose(spec, ideal[0], None).round(*ideal), 1, size)
    tiles: list[int] = (order // 128).tolist()
    columns = weight.t().contiguous()[order]
    found: list[Tensor] = []

    def loop() -> None:
        found[:] = [*found[-1:], loops.descend(columns.clone(), factor, tiles, lanes, 64)[1]]

    ours, torchs = medians(loop, loop, repeat)
    difference = f"loss x {float(found[0].sum() / found[1].sum()):.7f}"
    what = f"GPTQ's loop, int4 g128, {size} x {size}"
    yield {"what": what, "seconds": ours, "torch_seconds": torchs, "difference": difference}
    losses: list[float] = []

    def solve(order: str) -> None:
        q = GPTQ(order=order).solve(weight, spec, moments).q
        losses.append(float(row_errors(weight, q, moments.hessian).sum()))

    ours, torchs = medians(lambda: solve("act"), lambda: solve("act"), 1, warm=0)
    what = f"GPTQ with its Cholesky factor and loss, {size} x {size}"
    difference = f"loss x {losses[0] / losses[1]:.7f}"
    yield {"what": what, "seconds": ours, "torch_seconds": torchs, "difference": difference}


def bench_search(repeat: int, size: int) -> Iterator[Run]:
    """Scales of one matrix in groups of 128."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(1)) * 0.05
    specs = {
        "int4": int_weight(4, 128),
        "int4 asymmetric": int_weight(4, 128, asymmetric=True),
        "nf4": nf4_double_quantized(128),
    }
    ranges: list[Range] = [MSE(), Weighted()]
    for name, spec in specs.items():
        for choice in ranges:
            rows = size // 16 if name == "nf4" else size if (name, choice.name) == ("int4", "mse") else size // 4
            tiles = to_tiles(weight[:rows], spec.granularity)
            found: list[Tensor] = []

            def search(choice: Range = choice, tiles: Tensor = tiles, spec: Any = spec, found: Any = found) -> None:
                found[:] = [*found[-1:], choice.scale(tiles, spec)[0]]

            ours, torchs = medians(search, search, repeat)
            what = f"{choice.name}, {name} g128, {rows} x {size}"
            difference = f"{int((found[0] != found[1]).sum())} of {found[0].numel()} scales differ"
            yield {"what": what, "seconds": ours, "torch_seconds": torchs, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("gram", "gptq", "search"), help="one of the three parts; not written down")
    parser.add_argument("--threads", default="1,2", help="thread counts, with commas between them")
    parser.add_argument("--size", type=int, default=4096, help="of the matrices of GPTQ and range searches")
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    runs: list[Run] = []
    with torch.inference_mode():
        for threads in (int(count) for count in arguments.threads.split(",")):
            torch.set_num_threads(threads)
            parts = {
                "gram": lambda: bench_gram(4 * arguments.repeat),
                "gptq": lambda: bench_gptq(arguments.repeat, arguments.size),
                "search": lambda: bench_search(arguments.repeat, arguments.size),
            }
            for name, part in parts.items():
                if arguments.only in (None, name):
                    for run in part():
                        runs.append({"threads": threads, **run})
                        print(runs[-1], file=sys.stderr, flush=True)
    rows = [
        [
            run["what"],
            str(run["threads"]),
            f"{1000 * run['seconds']:.1f}",
            f"{1000 * run['torch_seconds']:.1f}",
            f"{run['torch_seconds'] / run['seconds']:.2f}",
            run["difference"],
        ]
        for run in runs
    ]
    text = (
        "# Native loops of quantization\n\n"
        f"{machine_line()}; kernels for {isa()}. Medians, both sides in turn; torch is the path without kernels.\n\n"
        + table(["work", "threads", "native ms", "torch ms", "times as fast", "difference"], rows)
    )
    if arguments.only:
        print(text)
    else:
        write_results("solver-kernels", {"isa": isa(), "runs": runs}, text)


if __name__ == "__main__":
    main()
