"""How fast one thread rounds, measures and packs a matrix, for each preset.

    make bench-numerics                         # every preset on a bfloat16 matrix of 4096 x 4096
    make bench-numerics ARGS="--schemes W4A16,NVFP4A16 --repeat 9"

MB/s counts the bytes of the original; medians of several repetitions after one to warm up. The copy of the matrix, read
and written once by the same thread, is the machine's own limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.pipeline.layers import measure_in_pieces
from bitgrain.recipes import PRESETS
from bitgrain.solvers import get_solver


def median_seconds(work: Callable[[], Any], repeat: int) -> float:
    """Of `repeat` runs, after one that is not counted."""
    work()
    seconds: list[float] = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def bench(name: str, weight: torch.Tensor, repeat: int) -> dict[str, Any]:
    """Seconds of each step for one preset."""
    scheme = PRESETS[name].for_dtype(weight.dtype)
    rows, cols = weight.shape
    layer = StoredLayer("m.weight", "m", "m", "Linear", "linear", rows, cols, 1, False, weight.dtype, scheme)
    layout = CompressedTensors() if CompressedTensors().refusal(layer) is None else BitgrainLayout()
    solver = get_solver("rtn")
    q = solver.solve(weight, scheme.weight)
    steps = {
        "quantize": median_seconds(lambda: solver.solve(weight, scheme.weight), repeat),
        "measure": median_seconds(lambda: measure_in_pieces(weight, q), repeat),
        "pack": median_seconds(lambda: layout.encode(layer, [q]), repeat),
    }
    return {"scheme": name, "layout": layout.name, "seconds": steps, "total_s": sum(steps.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="all", help="names with commas between them")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(PRESETS) if arguments.schemes == "all" else arguments.schemes.split(",")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(arguments.size, arguments.size, generator=generator) * 0.02).to(torch.bfloat16)
    megabytes = weight.nbytes / 1e6
    target = torch.empty_like(weight)
    with torch.inference_mode():
        copy = megabytes / median_seconds(lambda: target.copy_(weight), arguments.repeat)
        results = [bench(name, weight, arguments.repeat) for name in names]
    rows = [
        [
            r["scheme"],
            *(f"{megabytes / s:.0f}" if s > 1e-4 else "as is" for s in r["seconds"].values()),
            f"{megabytes / r['total_s']:.0f}",
        ]
        for r in results
    ]
    text = (
        "# Speed of the numerics\n\n"
        f"{machine_line()}. One thread, bfloat16 {arguments.size} x {arguments.size} ({megabytes:.1f} MB), medians of "
        f"{arguments.repeat}; MB/s of the original. A copy of the matrix runs at {copy:.0f} MB/s. "
        "As is: codes are written without packing.\n\n"
        + table(["scheme", "quantize MB/s", "measure MB/s", "pack MB/s", "all three MB/s"], rows)
    )
    write_results("numerics", {"copy_mb_per_s": copy, "megabytes": megabytes, "runs": results}, text)


if __name__ == "__main__":
    main()
