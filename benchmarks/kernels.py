"""One linear layer at a time: bitgrain's kernels beside those of other libraries, and beside the machine's limits.

    python benchmarks/kernels.py                                     # some fifteen minutes
    python benchmarks/kernels.py --shapes 4096x4096 --rows 1,16      # a part of it
    python benchmarks/kernels.py --all --minutes 30                  # the slow contestants too

All contestants of a shape are measured in each round, beside memory bandwidth and the peak of int8 products. How fast
memory is also depends on where a process finds it, for as long as the process lives: so all is measured by several
generations of processes, and medians are taken over all their rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from common import machine_line, write_results
from kernels_report import CELL_KEYS, report
from layout_facts import layout_facts
from rounds import Contestant, PeerError, add_options, busy, median, rest, say, wanted

SHAPES = "4096x4096,4096x14336,2048x8192,768x3072"
ROWS = "1,4,16,64,512"
MODULES = ("linear_bitgrain", "linear_torch", "linear_onnxruntime", "linear_openvino", "linear_ggml")
MANY_ROWS, FEW_BYTES, MANY_BYTES = 16, 200 << 20, 32 << 20
"""Up to MANY_ROWS rows, weights of FEW_BYTES take turns; above that time is spent on products."""
SLOW = (
    "torch float32",
    "torch qlinear u8 static",
    "torch int8pack",
    "torch int4pack",
    "onnxruntime MatMulNBits 8 b32",
    "OpenVINO bfloat16",
    "W3A16",
    "W2A16",
)
"""Only with --all; and those of ggml whose layout is not the processor's own."""
LEAST_ROUNDS = 3
BUSY_SECONDS = 0.25
"""Of a turn beside busy processes: many time slices of theirs."""


def left_out(name: str, everything: bool) -> bool:
    plain_ggml = name in ("ggml Q4_0", "ggml Q4_K")
    return not everything and (plain_ggml or name.startswith(SLOW))


def start(arguments: argparse.Namespace) -> tuple[dict[str, Contestant], dict[str, str], dict[str, str]]:
    """Contestants by name, versions, and why libraries are not here."""
    found: dict[str, Contestant] = {}
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    for module in MODULES:
        try:
            library = Contestant(module, arguments.threads, arguments.peers_python)
        except PeerError as error:
            absent[module.removeprefix("linear_")] = str(error)
            continue
        versions |= library.versions
        for name in library.ask("names"):
            if wanted(arguments, name) and not left_out(name, arguments.all):
                found[name] = library
        if library not in found.values() and module != MODULES[0]:
            library.close()
        if module == MODULES[0]:
            found["probe"] = library
    return found, versions, absent


def measure_cell(
    cell: tuple[int, int, int], who: dict[str, Contestant], arguments: argparse.Namespace, until: float
) -> dict[str, Any]:
    """One shape in all rounds, or in fewer (at least LEAST_ROUNDS) if it is later than `until`."""
    k, n, m = cell
    failed: dict[str, str] = {}
    made: dict[str, dict[str, float]] = {}
    rotate = FEW_BYTES if m <= MANY_ROWS else MANY_BYTES
    for name, library in who.items():
        if name != "probe":
            try:
                made[name] = library.ask("make", name=name, k=k, n=n, m=m, rotate=rotate)
            except PeerError as error:
                failed[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in made}
    beside: dict[str, list[float]] = {name: [] for name in made}
    limits: dict[str, list[float]] = {}
    for done in range(arguments.rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > until:
            break
        if "probe" in who:
            rest()
            for key, value in who["probe"].ask("probe").items():
                limits.setdefault(key, []).append(value)
        for name in made:
            rest()
            times[name].append(who[name].ask("time", name=name, seconds=arguments.seconds))
        with busy(arguments.busy):
            for name in made if arguments.busy else ():
                beside[name].append(who[name].ask("time", name=name, seconds=BUSY_SECONDS))
    contestants = {
        name: {"all_ms": [1e3 * t for t in one], "nbytes": made[name]["nbytes"]} for name, one in times.items()
    }
    for name, one in beside.items():
        if one:
            contestants[name]["all_busy_ms"] = [1e3 * t for t in one]
    return dict(zip(CELL_KEYS, (k, n, m, limits, contestants, failed), strict=True))


def merge_cells(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One shape as several generations of processes measured it: medians over all rounds."""
    contestants: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell["contestants"]):
        found = [cell["contestants"][name] for cell in cells if name in cell["contestants"]]
        all_ms = [one["all_ms"] for one in found]
        contestants[name] = {
            "ms": median([ms for one in all_ms for ms in one]),
            "all_ms": all_ms,
            "nbytes": found[0]["nbytes"],
        }
        if all("all_busy_ms" in one for one in found):
            contestants[name]["busy_ms"] = median([ms for one in found for ms in one["all_busy_ms"]])
    limits = {key: median([x for cell in cells for x in cell["limits"][key]]) for key in cells[0]["limits"]}
    failed = {name: why for cell in cells for name, why in cell["failed"].items() if name not in contestants}
    first = cells[0]
    return dict(zip(CELL_KEYS, (first["k"], first["n"], first["m"], limits, contestants, failed), strict=True))


def measure(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> dict[str, Any]:
    """All shapes; the time that is left is shared by the shapes that are left."""
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    ends = time.monotonic() + 60 * arguments.minutes
    cells: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    left = len(shapes) * len(rows) * arguments.processes
    for _ in range(arguments.processes):
        who, versions, absent = start(arguments)
        for k, n in shapes:
            for m in rows:
                until = time.monotonic() + (ends - time.monotonic()) / left
                cells.setdefault((k, n, m), []).append(measure_cell((k, n, m), who, arguments, until))
                left -= 1
                say(f"K {k}, N {n}, {m} rows: measured, {left} to go")
            for library in set(who.values()):
                library.ask("free")
        for library in set(who.values()):
            library.close()
    settings = {"threads": arguments.threads, "busy": arguments.busy, "processes": arguments.processes}
    merged = [merge_cells(one) for one in cells.values()]
    return {"settings": settings, "versions": versions, "absent": absent, "cells": merged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="inputs x outputs, with commas between them")
    parser.add_argument("--rows", default=ROWS, help="of the input, with commas between them")
    parser.add_argument("--seconds", type=float, default=0.04, help="of a turn, or as long as one run takes")
    parser.add_argument("--all", action="store_true", help="the slow contestants too")
    parser.add_argument("--name", default="kernels", help="of the files in benchmarks/results")
    parser.add_argument("--processes", type=int, default=3, help="generations of processes, one after the other")
    add_options(parser, minutes=13.5)
    arguments = parser.parse_args()
    shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in arguments.shapes.split(","))]
    data = measure(arguments, shapes, [int(m) for m in arguments.rows.split(",")])
    data["layouts"] = layout_facts()
    write_results(arguments.name, data, report(data, machine_line()))


if __name__ == "__main__":
    main()
