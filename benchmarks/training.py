"""Quantization-aware training beside rounding after training: KL divergence, and CPU time of the whole command.

    make bench-training
    make bench-training ARGS="--schemes TERNARY --work FOLDER"

For each scheme the recipes below are measured, and `bitgrain train`. What was made stays in the work folder: a run that
was stopped goes on there, and rows that are whole are only measured again. CPU time is user and system time of all the
processes that a row took, from the first start to the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import yaml
from common import SHARED, machine_line, table, write_results

MODEL = SHARED / "models" / "llama"
TEXT = SHARED / "text" / "calibration.txt"
TEXTS = {"heldout.txt": SHARED / "text" / "heldout.txt", "wikitext2-test.raw": SHARED / "text" / "wikitext2-test.raw"}
WINDOWS = 100

_ROTATED = {
    "transforms": [{"name": "rotate", "r4": True, "learn": 200}, {"name": "balance", "optional": True}],
    "solver": {
        "name": "gptq",
        "candidates": ["minmax*0.84", "minmax*0.92", "minmax", "weighted", "weighted*1.08"],
        "sweeps": 6,
    },
    "target": {},
}
AFTER: dict[str, dict[str, dict[str, Any] | str]] = {
    "W2A16_ASYM": {"balanced": "balanced", "best": "best"},
    "TERNARY": {"balanced": "balanced", "best": "best"},
    "W4A4": {"online-learned": _ROTATED, "online-learned-best": {**_ROTATED, "tuning": {"end_to_end": {}}}},
}
"""Scheme -> name -> a recipe of the package, or its keys: rounding after training."""
TRAIN: dict[str, list[str]] = {
    "W2A16_ASYM": ["--steps", "900"],
    "TERNARY": ["--steps", "900"],
    "W4A4": ["--steps", "600", "--rate", "0.006"],
}
"""Scheme -> what `bitgrain train` is given beside it."""


def run(arguments: list[str], record: Path) -> None:
    """One command on one thread; its CPU time is added to what `record` holds, also where it fails or is stopped."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "bitgrain", *arguments], check=True, env=environment)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        old = json.loads(record.read_text())["cpu_s"] if record.exists() else 0.0
        record.write_text(json.dumps({"cpu_s": old + spent}))


def make(scheme: str, name: str, work: Path) -> tuple[Path, float]:
    """The folder of a row, made if it is not there, and its CPU time."""
    out = work / f"{scheme}-{name}"
    record = work / f"{scheme}-{name}.json"
    if not out.exists():
        common = [str(MODEL), "--scheme", scheme, "-o", str(out), "--workers", "1", "--device", "cpu"]
        if name == "train":
            run(["train", *common, "--text", str(TEXT), "--autocast", *TRAIN[scheme]], record)
        else:
            recipe = AFTER[scheme][name]
            if not isinstance(recipe, str):
                path = work / f"{scheme}-{name}.yaml"
                path.write_text(yaml.safe_dump({"scheme": scheme, **recipe}))
                recipe = str(path)
            run(["quantize", *common, "--recipe", recipe, "--calibration", str(TEXT)], record)
    return out, json.loads(record.read_text())["cpu_s"]


def measure(out: Path) -> dict[str, dict[str, float]]:
    """KL and the rest on each text, by a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for name, path in TEXTS.items():
        command = [sys.executable, "-m", "bitgrain", "eval", str(out), "--against", str(MODEL), "--text", str(path)]
        answer = subprocess.run(
            [*command, "--windows", str(WINDOWS), "--device", "cpu", "--json", "-"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found[name] = json.loads(answer.stdout)
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    header = ["scheme", "method", *(f"{text}: {what}" for text in TEXTS for what in ("KL", "top-1")), "of PTQ", "CPU s"]
    least: dict[str, float] = {}
    for row in rows:
        if row["method"] != "train":
            kl = row["figures"]["heldout.txt"]["kl"]
            least[row["scheme"]] = min(kl, least.get(row["scheme"], kl))
    lines = [
        [
            row["scheme"],
            row["method"],
            *(
                cell
                for text in TEXTS
                for cell in (f"{row['figures'][text]['kl']:.5f}", f"{100 * row['figures'][text]['top1']:.2f} %")
            ),
            f"{row['figures']['heldout.txt']['kl'] / least[row['scheme']]:.2f}",
            f"{row['cpu_s']:.0f}",
        ]
        for row in rows
    ]
    return (
        "# Quantization-aware training\n\n"
        f"{machine_line()}, one thread. KL(base || quantized) in nats per token over {WINDOWS} windows of 512 tokens. "
        "Calibrated and trained on calibration.txt. `train` is `bitgrain train` with its own start; CPU s is the whole "
        "command. of PTQ: the first KL, relative to the best rounding after training in this table.\n\n"
        + table(header, lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(AFTER), help="with commas between them")
    parser.add_argument("--work", type=Path, default=Path("training-work"), help="where what is made stays")
    parser.add_argument("--name", default="training", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit("the reference models (../shared) are not here")
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for scheme in arguments.schemes.split(","):
        for name in [*AFTER[scheme], "train"]:
            out, spent = make(scheme, name, arguments.work)
            rows.append({"scheme": scheme, "method": name, "cpu_s": spent, "figures": measure(out)})
    write_results(arguments.name, {"train": TRAIN, "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
