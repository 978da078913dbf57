"""Our choice of codes in GGUF's types against llama.cpp's own at the same size, and GPTQ's W4 g128 against GPTQModel's.

    make bench-gguf-sizes
    make bench-gguf-sizes ARGS="--only 4.70 --no-peers"

Each pair is one row of ours, quantized disk to disk, loaded back and compared with the base as `make bench-accuracy`
does it, and one setting of another tool, measured by its harness where it is installed (see accuracy.py). Sizes count
decoder linears only. What a pair's bar says is the share of the peer's KL that ours may have.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy import Runner, key_of, say
from accuracy_methods import Method, file_digest
from accuracy_peers import View, absent
from accuracy_processes import Processes
from accuracy_report import Store, nats, number
from accuracy_texts import Job, reference_jobs
from common import RESULTS, ROOT, machine_line, table

MODEL = "llama"
RECIPE = {"base": "balanced", "calibrated": True}


@dataclass(frozen=True)
class Pair:
    """Ours against a peer's; `bar`: what share of its KL ours may have, None where nothing is asked."""

    name: str
    ours: Method
    peer: Method
    bar: float | None = None


def mixed(bits: float, setting: str, bar: float) -> Pair:
    """Types chosen by the budget at the size that llama-quantize's mix has."""
    ours = Method(f"{bits:.2f} bits/balanced", "bitgrain", {"bits": bits, "engine": "gguf", "recipe": RECIPE})
    return Pair(f"{bits:.2f} bits", ours, Method(f"gguf/{setting}", "gguf", {"setting": setting}), bar)


def uniform(kind: str, setting: str) -> Pair:
    """One type everywhere."""
    ours = Method(f"{kind}/balanced", "bitgrain", {"scheme": f"GGUF_{kind}", "recipe": RECIPE})
    return Pair(kind, ours, Method(f"gguf/{setting}", "gguf", {"setting": setting}))


def gptq_layout(name: str, zero_point: str, setting: str, bar: float | None) -> Pair:
    """What a GPTQ file holds: groups of 128 with float16 scales."""
    weight = {"format": "int4", "granularity": "per_group(128)", "zero_point": zero_point, "scale": "float16"}
    scheme = {"name": name, "weight": weight, "prescribed": True}
    ours = Method(f"{name}/balanced", "bitgrain", {"scheme": scheme, "recipe": RECIPE})
    return Pair(name, ours, Method(f"gptqmodel/{setting}", "gptqmodel", {"setting": setting}), bar)


PAIRS = (
    mixed(4.70, "Q4_K_M-im", 0.6),
    mixed(3.85, "Q3_K_M-im", 0.6),
    mixed(2.93, "Q2_K-im", 0.6),
    uniform("Q6_K", "Q6_K"),
    uniform("Q4_K", "Q4_K_S-im"),
    uniform("Q4_0", "Q4_0-im"),
    uniform("IQ4_XS", "IQ4_XS-im"),
    uniform("Q3_K", "Q3_K_S-im"),
    gptq_layout("GPTQ_W4G128", "none", "w4g128-mse", 0.75),
    gptq_layout("GPTQ_W4G128_ASYM", "integer", "w4g128-mse", 0.75),
)


def page(data: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    rows = {row["name"]: row for row in data["rows"] if "failed" not in row}
    texts = [text["text"] for text in data["texts"]]
    header = ["pair", "ours", "bits"] + [f"{text}: KL" for text in texts] + ["CPU s", "peer", "bits"]
    header += [f"{text}: KL" for text in texts] + [f"{text}: ours / peer" for text in texts] + ["bar"]
    lines: list[list[str]] = []
    for pair in PAIRS:
        ours, peer = rows.get(pair.ours.name), rows.get(pair.peer.name)
        if ours is None:
            continue
        line = [pair.name, pair.ours.name, number(ours["bits"], ".3f")]
        line += [nats(_kl(ours, text)) for text in texts] + [number(ours["cpu_s"], ".0f"), pair.peer.name]
        line += [number(None if peer is None else peer["bits"], ".3f")] + [nats(_kl(peer, text)) for text in texts]
        line += [number(_ratio(ours, peer, text), ".2f") for text in texts] + [number(pair.bar, ".2f")]
        lines.append(line)
    failed = [f"- {row['name']}: {row['failed']}\n" for row in data["rows"] if "failed" in row]
    return (
        f"# GGUF's types and GPTQ's layout on {data['model']}, beside other tools'\n\n"
        f"{machine_line()}, one thread a row. Linears of the decoder blocks only; embeddings, norms and lm_head as "
        "they were. The same calibration text for all. KL(base || quantized) in nats per token, computed by bitgrain "
        "on the dequantized weights; Q4_K_S and the like of llama.cpp give some layers a larger type.\n\n"
        + table(header, lines)
        + ("\nFailed:\n\n" + "".join(failed) if failed else "")
    )


def _kl(row: Mapping[str, Any] | None, text: str) -> float | None:
    return None if row is None else row["texts"].get(text, {}).get("kl")


def _ratio(ours: Mapping[str, Any], peer: Mapping[str, Any] | None, text: str) -> float | None:
    mine, its = _kl(ours, text), _kl(peer, text)
    return None if mine is None or its is None else mine / its


def measure(job: Job, pairs: Sequence[Pair], arguments: argparse.Namespace) -> None:
    """All rows of the pairs that are not there yet. Raises ValueError."""
    store = Store(arguments.results, "gguf", job.model.name, job.describe(), arguments.again, page)
    wanted = {one.name: one for pair in pairs for one in (pair.ours, pair.peer)}
    away = {} if not arguments.no_peers else {one.tool: "left out" for one in wanted.values() if not one.ours}
    for tool in {one.tool for one in wanted.values() if not one.ours} - set(away):
        if reason := absent(tool):
            away[tool] = reason
    for tool, reason in sorted(away.items()):
        say(f"{tool} skipped, {reason}")
    methods = [one for one in wanted.values() if one.tool not in away]
    todo = [one for one in methods if arguments.again or not store.has(one.name, key_of(one))]
    say(f"{len(todo)} rows to measure, {len(methods) - len(todo)} known")
    scratch = Path(tempfile.mkdtemp(prefix="bitgrain-bench-"))
    code = file_digest(*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "src").rglob("*.yaml")))
    runner = Runner(job, scratch, arguments.timeout, code, Processes())
    try:
        texts = runner.base()
        store.texts(texts)
        view = View(job, scratch / "view").make() if any(not one.ours for one in todo) else None
        for place, method in enumerate(todo, 1):
            row = runner.row(method, texts, view)
            store.add(row)
            told = row.get("failed") or f"KL {next(iter(row['texts'].values()))['kl']:.5f}"
            say(f"  {place}/{len(todo)} {method.name}: {told}")
    finally:
        runner.processes.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    store.write()
    print(store.page())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", help="names of pairs, or their beginnings, with commas between them")
    add("--no-peers", action="store_true", help="only our own rows")
    add("--windows", type=int, help="windows of each evaluation text (100)")
    add("--calibration-windows", type=int, default=128)
    add("--timeout", type=float, default=3600, help="seconds after which a row is given up")
    add("--results", type=Path, default=RESULTS, help="where results are kept")
    add("--again", action="store_true", help="measure rows that are known already")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that temporary files are removed
    (job,) = (one for one in reference_jobs(arguments.windows, None, arguments.calibration_windows)
              if one.model.name == MODEL)  # fmt: skip
    if job.missing:
        sys.exit(f"{MODEL}: {', '.join(job.missing)} not found")
    starts = tuple(arguments.only.split(",")) if arguments.only else ("",)
    pairs = [pair for pair in PAIRS if pair.name.startswith(starts)]
    if not pairs:
        parser.error(f"--only names some of {', '.join(pair.name for pair in PAIRS)}")
    try:
        measure(job, pairs, arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
