"""What it saves to keep some input channels in 16 bits, chosen by activation, by weight or at random.

    make bench-outlier-channels
    make bench-outlier-channels ARGS="--models llama --schemes W3A16 --windows 20"

AWQ's first experiment (arXiv 2306.00978, table 1) on the reference models: round to nearest, 0.1, 1 and 3 % of the
channels. A model is calibrated once; each row is quantized disk to disk by these statistics, loaded, and compared with
the original on held-out text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import SHARED, machine_line, table, write_results

import bitgrain
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.evaluation.language import record_base

SHARES = (0.001, 0.01, 0.03)
CHOICES = ("activation", "weight", "random")
SEQLEN, CALIBRATION_WINDOWS = 512, 32


class Model:
    """A reference model, calibrated, and the original's predictions on held-out text."""

    def __init__(self, folder: Path, text: Path, calibration: Path, windows: int, scratch: Path) -> None:
        self.folder, self.text, self.windows, self.out = folder, text, windows, scratch / "out"
        self.statistics = scratch / f"{folder.name}-statistics"
        shown = {"text": str(calibration), "windows": CALIBRATION_WINDOWS}
        bitgrain.calibrate(folder, self.statistics, calibration=shown, device="cpu")
        ids = token_windows(load_tokenizer(folder), read_text(text), SEQLEN, windows)
        self.base = record_base(bitgrain.load(folder, device="cpu"), ids)

    def measure(self, scheme: str, share: float, by: str, solver: str) -> dict[str, Any]:
        """One row. share 0: nothing is kept."""
        columns = {"share": share, "by": by} if share else None
        settings: dict[str, Any] = {"solver": solver, "columns": columns, "statistics": self.statistics}
        made = bitgrain.quantize(self.folder, self.out, scheme, device="cpu", **settings)
        held: dict[str, Any] = {"text": self.text, "seqlen": SEQLEN, "windows": self.windows}
        found = bitgrain.evaluate(self.out, against=self.base, device="cpu", **held)
        shutil.rmtree(self.out)
        row = {"model": self.folder.name, "scheme": scheme, "share": share, "by": by}
        figures = {"kl": found.kl, "perplexity": found.perplexity, "of_base": found.base_perplexity}
        return {**row, "bits": made.plan.bits_per_weight, **figures}


def report(rows: Sequence[dict[str, Any]], windows: int, solver: str) -> str:
    """The Markdown page: a table for each model and scheme, a row for each share."""
    page = (
        "# Channels kept in 16 bits\n\n"
        f"{machine_line()}. {solver}; KL in nats per token and perplexity on {windows} windows of {SEQLEN} tokens of "
        "heldout.txt. Bits: stored for each quantized weight, scales and kept columns included.\n"
    )
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        of = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme)]
        lines: list[list[str]] = []
        for share in dict.fromkeys(row["share"] for row in of):
            here = {row["by"]: row for row in of if row["share"] == share}
            cells = [here.get(by, here.get("none")) for by in CHOICES]
            figures = [f"{row['kl']:.4f} / {row['perplexity']:.2f}" for row in cells if row is not None]
            lines.append([f"{100 * share:g} %", f"{next(iter(here.values()))['bits']:.3f}", *figures])
        page += f"\n## {model}, {scheme} (perplexity of the original: {of[0]['of_base']:.2f})\n\n"
        page += table(["kept", "bits", *(f"by {by}" if by != "random" else by for by in CHOICES)], lines)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,llama-outliers", help="reference models, with commas between them")
    parser.add_argument("--schemes", default="W3A16,W4A16", help="with commas between them")
    parser.add_argument("--solver", default="rtn")
    parser.add_argument("--windows", type=int, default=100, help="of held-out text")
    parser.add_argument("--name", default="outlier-channels", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    text, calibration = SHARED / "text" / "heldout.txt", SHARED / "text" / "calibration.txt"
    models = [SHARED / "models" / name for name in arguments.models.split(",")]
    missing = [path.name for path in (*models, text, calibration) if not path.exists()]
    if missing:
        parser.error(f"not found beside the repository: {', '.join(missing)}")
    settings = {"windows": arguments.windows, "solver": arguments.solver}
    kinds = [(0.0, "none"), *((share, by) for share in SHARES for by in CHOICES)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bitgrain-bench-") as scratch:
        ready = [Model(folder, text, calibration, arguments.windows, Path(scratch)) for folder in models]
        for scheme in arguments.schemes.split(","):
            for model in ready:
                for share, by in kinds:
                    rows.append(model.measure(scheme, share, by, arguments.solver))
                    print(rows[-1], file=sys.stderr, flush=True)
                write_results(arguments.name, {**settings, "rows": rows}, report(rows, **settings), show=False)
    print(report(rows, **settings))


if __name__ == "__main__":
    main()
