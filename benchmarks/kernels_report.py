"""The page of benchmarks/kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import table

CELL_KEYS = ("k", "n", "m", "limits", "contestants", "failed")
EIGHT = ("torch linear_dynamic", "torch int8pack", "onnxruntime Dynamic", "onnxruntime MatMulNBits 8")
EIGHT += ("OpenVINO int8", "ggml Q8_0")
FOUR = ("torch int4pack", "onnxruntime MatMulNBits 4", "OpenVINO i4", "OpenVINO u4", "ggml Q4")
OURS = {"W8A8": EIGHT, "W4A8 g128": FOUR, "W4A16 g128": FOUR, "W3A8 g128": FOUR, "W2A8 g128": FOUR}
OURS |= {"W3A16 g128": FOUR, "W2A16 g128": FOUR}
OURS |= {"W8A16 fp8": ("torch bfloat16",), "W8A8 fp8": ("torch bfloat16",)}
"""What each of our schemes is compared with: peers of as many bits; of 4 where nobody has fewer, of 16 where nobody has
FP8."""


def best_of(contestants: dict[str, Any], peers: tuple[str, ...]) -> tuple[str, float] | None:
    """(name, ms) of the fastest peer of a class."""
    found = [(one["ms"], name) for name, one in contestants.items() if name.startswith(peers)]
    return (min(found)[1], min(found)[0]) if found else None


def row_of(cell: dict[str, Any], scheme: str) -> list[str]:
    """Our time beside the best peer's and the machine's limits."""
    ours, limits = cell["contestants"][scheme], cell["limits"]
    seconds, best = ours["ms"] / 1e3, best_of(cell["contestants"], OURS[scheme])
    products = cell["m"] * cell["k"] * cell["n"] / seconds
    peak = limits.get("bf16" if "A16" in scheme or "fp8" in scheme else "int8")
    return [
        f"{cell['k']} x {cell['n']}",
        str(cell["m"]),
        scheme,
        f"{ours['ms']:.3f}",
        "-" if best is None else f"{best[1]:.3f}",
        "-" if best is None else best[0],
        "-" if best is None else f"{ours['ms'] / best[1]:.2f}",
        f"{100 * ours['nbytes'] / seconds / limits['bandwidth']:.0f} %" if "bandwidth" in limits else "-",
        f"{100 * products / peak:.0f} %" if peak else "-",
    ]


def limits_line(cells: Sequence[dict[str, Any]]) -> str:
    """The machine's limits over all shapes."""
    found = [cell["limits"] for cell in cells if cell["limits"]]
    if not found:
        return ""
    ends = {key: (min(one[key] for one in found), max(one[key] for one in found)) for key in found[0]}
    (slow, fast), (low, high) = ends["bandwidth"], ends["int8"]
    return (
        f"The machine in the same rounds: memory is read at {slow / 1e9:.0f} to {fast / 1e9:.0f} GB/s, products of "
        f"bytes peak at {2 * low / 1e9:.0f} to {2 * high / 1e9:.0f} GOPS (a product and a sum are two operations), "
        f"of bfloat16 at {2 * ends['bf16'][0] / 1e9:.0f} to {2 * ends['bf16'][1] / 1e9:.0f}.\n\n"
    )


def notes(data: dict[str, Any]) -> list[str]:
    """Versions, and who is missing."""
    found = [f"versions: {', '.join(f'{name} {number}' for name, number in data['versions'].items())}"]
    found += [f"left out: {name} ({why.splitlines()[0]})" for name, why in data["absent"].items()]
    failed = {name: why for cell in data["cells"] for name, why in cell["failed"].items()}
    return found + [f"failed: {name} ({why.splitlines()[0]})" for name, why in failed.items()]


def report(data: dict[str, Any], where: str) -> str:
    """The Markdown page."""
    header = ["inputs x outputs", "rows", "scheme", "ms", "best peer ms", "best peer", "ratio", "of DRAM", "of peak"]
    rows = [row_of(cell, name) for cell in data["cells"] for name in OURS if name in cell["contestants"]]
    settings = data["settings"]
    everyone = [
        [f"{cell['k']} x {cell['n']}", str(cell["m"]), name, f"{one['ms']:.3f}"]
        for cell in data["cells"]
        for name, one in sorted(cell["contestants"].items(), key=lambda item: item[1]["ms"])
    ]
    layouts = [
        [facts["scheme"], f"{facts['bits_per_weight']:.3f}"]
        + [f"{facts[key]:.1f}" if facts[key] else "-" for key in ("instructions_few", "instructions_many")]
        for facts in data["layouts"]
    ]
    return (
        "# Speed of linear layers\n\n"
        f"{where}; {settings['threads']} threads. Medians of interleaved rounds in "
        f"{settings['processes']} generations of processes. Ratio: our time / the best "
        "peer's of as many bits (4 where none has fewer, 16 beside FP8); below 1 we are faster.\n\n"
        + limits_line(data["cells"])
        + table(header, rows)
        + "\n- of DRAM: packed bytes / our time, as a part of the bandwidth of the same rounds; says something for few "
        "rows\n- of peak: products / our time, as a part of the int8 (A16, fp8: bfloat16) peak of the same rounds; "
        "says something for many rows\n"
        + "".join(f"- {line}\n" for line in notes(data))
        + ("\n## What no machine changes\n\n" + layouts_text(layouts) if layouts else "")
        + busy_text(data)
        + "\n## Everybody\n\n"
        + table(["inputs x outputs", "rows", "contestant", "ms"], everyone)
    )


def busy_text(data: dict[str, Any]) -> str:
    """How much slower everybody is beside busy processes, if that was asked for."""
    if not data["settings"]["busy"]:
        return ""
    rows: list[list[str]] = []
    for cell in data["cells"]:
        ratios = {name: one["busy_ms"] / one["ms"] for name, one in cell["contestants"].items()}
        for name in sorted(ratios, key=ratios.__getitem__):
            one = cell["contestants"][name]
            times = [f"{one['ms']:.3f}", f"{one['busy_ms']:.3f}", f"{ratios[name]:.1f}"]
            rows.append([f"{cell['k']} x {cell['n']}", str(cell["m"]), name, *times])
    header = ["inputs x outputs", "rows", "contestant", "alone ms", "beside ms", "times slower"]
    return f"\n## Beside {data['settings']['busy']} busy processes\n\n" + table(header, rows)


def layouts_text(rows: list[list[str]]) -> str:
    """Bytes and instructions of the packed layouts."""
    return (
        table(["scheme", "bits a weight", "instructions, 1 row", "instructions, full tile"], rows)
        + "\n- bits a weight: packed, with scales and all padding, at 4096 x 4096\n- instructions: of the innermost "
        "loop as compiled for AVX-512, for each one that makes 64 products; the rest load, unpack and loop\n"
    )
