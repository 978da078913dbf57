"""Files that other programs made: bitgrain reads them, and finds the perplexity that each program finds itself.

    make bench-peer-files ARGS="--peer llmcompressor=VENV/bin/python --peer llama.cpp=VENV/bin/python
      --quantizer llama-quantize"

Each file of peer_files.yaml is made by its program in a Python of its own (benchmarks/peers), loaded from disk by that
program's own loader in float32, and measured over windows of the same tokens; then bitgrain loads the very same file,
in another process. What is not measured this time (`--only`, a Python that is not given) stays in the table as it was
measured last with the same model, text and windows; programs that never were are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy_peers import last_line
from accuracy_processes import Processes
from common import RESULTS, ROOT, SHARED, machine_line, table, write_results

import bitgrain
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows

SCRIPTS = ROOT / "benchmarks" / "peers"
PROGRAMS = {
    "llmcompressor": "llm-compressor",
    "gptqmodel": "GPTQModel",
    "autoround": "auto-round",
    "bitsandbytes": "bitsandbytes",
    "llama.cpp": "llama-quantize, llama-cpp-python",
    "mlx": "mlx-lm",
}
"""As `--peer` has them, and as they call themselves. auto-round runs AWQ files on a CPU with GPTQModel."""
EQUAL = 1e-4
"""Of a ratio of perplexities, from 1: two float32 programs that add in different orders are nearer."""
NOTE = """Each file is loaded by the program that made it, in float32, and by bitgrain. Allowed: how far from 1 the
ratio of perplexities may be; more for llama.cpp, which rounds the inputs of every layer to 8 bits (and keys and values
to 16), for LLM.int8(), where bitsandbytes rounds inputs to float16 before it rounds them to 8 bits, and for NVFP4
inputs, which differ by whole steps after the last bit of a weight did. auto-round insists on float16. GPTQModel writes
models in bfloat16, and bitgrain dequantizes to the dtype of the original, GPTQModel to float32. Mean difference: of the
loss of one token, in nats, absolute.""".replace("\n", " ")
SECONDS = 900
"""One file may take."""


@dataclass(frozen=True)
class Work:
    """Where everything lies for one run."""

    model: Path
    scratch: Path
    quantizer: str
    processes: Processes

    def ask(self, python: str, script: str, folder: Path, **request: Any) -> tuple[dict[str, Any], Any, str]:
        """What a script answers (empty where it failed before), its losses or None, and why there are none."""
        answer, losses = folder / f"{script}.json", folder / f"{script}.npy"
        told = {"answer": answer, "losses": losses, "ids": self.scratch / "ids.npy", **request}
        asked = folder / f"{script}.request.json"
        asked.write_text(json.dumps(told, default=str), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            status, out, errors = self.processes.run(
                [python, str(SCRIPTS / f"{script}.py"), str(asked)], environment, SECONDS, folder
            )
            why = "" if status == 0 else last_line(errors) or last_line(out) or f"it ended with {status}"
        except ValueError as error:
            why = str(error)
        found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
        return found, None if why else np.load(losses, allow_pickle=False), why


def measure(work: Work, peer: str, python: str, file: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row: the file made, read by its program, and read by us."""
    row: dict[str, Any] = {"peer": peer, "within": EQUAL, **file}
    made, theirs, why = work.ask(
        python,
        f"make_{peer.replace('.', '_')}",
        folder,
        model=work.model,
        settings=file["settings"],
        out=folder / "file",
        calibration=work.scratch / "calibration.npy",
        gguf=work.scratch / "base.gguf",
        quantizer=work.quantizer,
    )
    row["versions"] = made.get("versions", {})
    if not made:
        return {**row, "failure": f"not made: {why}"}
    row["theirs"] = None if theirs is None else perplexity(theirs)
    found, ours, reason = work.ask(sys.executable, "read_bitgrain", folder, path=made["path"])
    row |= {key: found.get(key) for key in ("layout", "layers", "weights")}
    row["ours"] = None if ours is None else perplexity(ours)
    if theirs is None:
        return {**row, "failure": f"its own program does not run it: {why}"}
    if ours is None:
        return {**row, "failure": f"not read by bitgrain: {reason}"}
    ratio = row["ours"] / row["theirs"]
    row |= {"ratio": ratio, "apart": float(np.abs(ours - theirs).mean()), "layers": found["layers"]}
    return {**row, "equal": abs(ratio - 1) <= row["within"]}


def with_earlier(
    rows: list[dict[str, Any]], wanted: dict[str, list[dict[str, Any]]], what: str
) -> list[dict[str, Any]]:
    """`rows`, and those of the last run over the same tokens for files that were not measured now, in the order of
    `wanted`."""
    path = RESULTS / "peer-files.json"
    last = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {(row["peer"], row["what"]): row for row in last.get("rows", []) if last.get("what") == what}
    found |= {(row["peer"], row["what"]): row for row in rows}
    keys = [(peer, file["what"]) for peer, files in wanted.items() for file in files]
    return [found[key] for key in keys if key in found]


def save(rows: list[dict[str, Any]], wanted: dict[str, list[dict[str, Any]]], what: str, show: bool = False) -> None:
    """Write the results, those of earlier runs among them."""
    rows = with_earlier(rows, wanted, what)
    known = {row["peer"] for row in rows}
    skipped = [f"{PROGRAMS[peer]}, whose Python was not given" for peer in wanted if peer not in known]
    text = report(rows, skipped, f"{machine_line()}. {what} {NOTE}")
    write_results("peer-files", {"what": what, "rows": rows, "skipped": skipped}, text, show=show)


def perplexity(losses: Any) -> float:
    return math.exp(min(float(losses.mean()), 700.0))


def report(rows: list[dict[str, Any]], skipped: list[str], told: str) -> str:
    header = [
        "made by",
        "file",
        "read as",
        "layers",
        "its perplexity",
        "ours",
        "ours / its",
        "mean difference",
        "allowed",
        "",
    ]
    cells: list[list[str]] = []
    for row in rows:
        numbers = [f"{row[key]:.5f}" if row.get(key) else "-" for key in ("theirs", "ours")]
        numbers.append(f"{row['ratio']:.6f}" if "ratio" in row else "-")
        numbers.append(f"{row['apart']:.1e}" if "apart" in row else "-")
        numbers.append(f"{row['within']:g}")
        verdict = row.get("failure", "").replace("|", "/") or ("equal" if row["equal"] else "NOT EQUAL")
        program = PROGRAMS[row["peer"]] + " " + next(iter(row["versions"].values()), "")
        what = [program.strip(), row["what"], row.get("layout") or "-", str(row.get("layers") or "-")]
        cells.append([*what, *numbers, verdict])
    lines = ["# Files that other programs made", "", told, "", *[f"Left out: {line}." for line in skipped]]
    return "\n".join([*lines, *([""] if skipped else []), table(header, cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PROGRAMS))
    parser.add_argument(
        "--quantizer", default="llama-quantize", help="for llama.cpp, whose Python has llama-cpp-python"
    )
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama")
    parser.add_argument("--text", type=Path, default=SHARED / "text" / "heldout.txt")
    parser.add_argument("--calibration", type=Path, default=SHARED / "text" / "calibration.txt")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", action="append", help="files whose name has this in it")
    parser.add_argument("--keep", type=Path, help="a folder for the files, which are thrown away otherwise")
    args = parser.parse_args()
    given = (one.partition("=") for one in args.peer)
    pythons = {peer: str(Path(python).absolute()) for peer, _, python in given}  # each runs in a folder of its own
    if unknown := set(pythons) - set(PROGRAMS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; known: {', '.join(PROGRAMS)}")
    if missing := [str(path) for path in (args.model, args.text, args.calibration) if not path.exists()]:
        print(f"skipped: {', '.join(missing)} not here; --model, --text and --calibration name others")
        return
    wanted: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    for peer in wanted.keys() - pythons.keys():
        print(f"left out: {PROGRAMS[peer]}, whose Python was not given")
    what = f"Model: {args.model.name}; {args.windows} windows of {args.length} tokens of {args.text.name}."
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = (args.keep or Path(name)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(args.model)
        for file, text, count in (("ids", args.text, args.windows), ("calibration", args.calibration, 32)):
            np.save(scratch / f"{file}.npy", token_windows(tokenizer, read_text(text), args.length, count)[:count])
        if "llama.cpp" in pythons and not (scratch / "base.gguf").exists():
            bitgrain.convert(args.model, "gguf:f32", scratch / "base.gguf")
        found = shutil.which(args.quantizer) or args.quantizer
        work = Work(args.model.resolve(), scratch, str(Path(found).absolute()), Processes())
        for peer, files in wanted.items():
            for i, file in enumerate(files):
                if peer not in pythons or (args.only and not any(part in file["what"] for part in args.only)):
                    continue
                folder = scratch / f"{peer}-{i}"
                folder.mkdir()
                rows.append({"date": date.today().isoformat()} | measure(work, peer, pythons[peer], file, folder))
                print(json.dumps(rows[-1]), flush=True)
                save(rows, wanted, what)
    save(rows, wanted, what, show=True)


if __name__ == "__main__":
    main()
