"""What is true of the kernels on every machine: bytes of packed weights, instructions of the innermost loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from common import ROOT

LEVEL, DOT = "avx512bf16", "vpdpbusd"
FUNCTION = re.compile(r"^[0-9a-f]+ <.*\bint_\w+<(\d+), (\d+), (true|false)>")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(?:([0-9a-f]+)\b)?")
SIZE, GROUP = 4096, 128
SCHEMES = {"W8A8": (8, SIZE), "W4A8 g128": (4, GROUP), "W3A8 g128": (3, GROUP), "W2A8 g128": (2, GROUP)}


def layout_facts() -> list[dict[str, Any]]:
    """For each scheme: packed bits of a weight, and instructions for each dot product instruction, of one row and of
    a full tile of rows; None where there is no object file of the level, or no objdump. Without the native module:
    nothing."""
    from bitgrain.kernels.int_linear import IntInputs, IntLinear
    from bitgrain.kernels.native import is_available

    if not is_available():
        return []
    loops = loops_of(object_file())
    facts: list[dict[str, Any]] = []
    for scheme, (bits, group) in SCHEMES.items():
        scale = "float32" if bits == 8 else "bfloat16"
        weight = IntLinear(SIZE, [group] * (SIZE // group), bits, IntInputs(), scale_dtype=dtype_of(scale))
        found = {rows: one for (b, rows, single), one in loops.items() if b == bits and single == (group == SIZE)}
        facts.append(
            {
                "scheme": scheme,
                "bits_per_weight": 8 * weight.panels.nbytes / SIZE**2,
                "instructions_few": found.get(1),
                "instructions_many": found[max(found)] if found else None,
                "rows_of_tile": max(found) if found else None,
            }
        )
    return facts


def dtype_of(name: str) -> Any:
    import torch

    return getattr(torch, name)


def object_file() -> Path | None:
    """What `make native` compiled for LEVEL; the module itself has no symbols."""
    found = sorted((ROOT / "build" / "native").rglob(f"{LEVEL}.cpp.o"))
    return found[0] if found and shutil.which("objdump") else None


def loops_of(file: Path | None) -> dict[tuple[int, int, bool], float]:
    """(bits, rows, one span) -> instructions / dot product instructions of the innermost loop with most of those."""
    if file is None:
        return {}
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[int, int, bool], float] = {}
    for block in text.split("\n\n"):
        name = FUNCTION.match(block.lstrip())
        if name and (ratio := innermost(block)) is not None:
            found[int(name[1]), int(name[2]), name[3] == "true"] = ratio
    return found


def innermost(block: str) -> float | None:
    """Of a function's listing: a loop is what lies between a jump back and where it goes."""
    code = [(int(m[1], 16), m[2], m[3]) for line in block.splitlines() if (m := INSTRUCTION.match(line))]
    places = {address: i for i, (address, _, _) in enumerate(code)}
    ends = [
        (places[int(to, 16)], i)
        for i, (_, name, to) in enumerate(code)
        if name.startswith("j") and to and int(to, 16) in places and places[int(to, 16)] < i
    ]
    inner = [(a, b) for a, b in ends if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in ends)]
    counts = [(sum(name == DOT for _, name, _ in code[a : b + 1]), b + 1 - a) for a, b in inner]
    dots, instructions = max(counts, default=(0, 0))
    return instructions / dots if dots else None
