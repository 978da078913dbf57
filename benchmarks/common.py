"""What the benchmarks share: where they ran, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
"""Reference models and texts that are not part of the repository; what needs them is skipped where they are absent."""


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that identifies the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = found[1]
    packages = ("bitgrain", "torch", "transformers", "compressed-tensors")
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def machine_line() -> str:
    """`machine` as one sentence for a report."""
    m = machine()
    return f"{m['date']}, {m['cores']} cores of {m['cpu']}, Python {m['python']}, torch {m['torch']}"


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (largest so far) of this process; ru_maxrss would count its parent's too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def random_llama(model: Path, blocks: int = 22) -> Path:
    """`model`: random weights, with 22 blocks 1.1 billion parameters, made where they are absent."""
    if not model.exists():
        tool = ROOT / "tools" / "make_random_llama.py"
        subprocess.run([sys.executable, tool, model, "--blocks", str(blocks)], check=True)
    return model


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(name: str, data: dict[str, Any], text: str, folder: Path = RESULTS, show: bool = True) -> None:
    """Write FOLDER/NAME.json and NAME.md, each whole or not at all, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", json.dumps({"machine": machine(), **data}, indent=2) + "\n"), ("md", text)):
        part = folder / f"{name}.{suffix}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / f"{name}.{suffix}")
    if show:
        print(text)
