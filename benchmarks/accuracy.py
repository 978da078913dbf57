"""What every method costs in accuracy, ours and other tools': KL divergence, top-1 agreement, perplexity, time, memory.

    make bench-accuracy                                         # the reference models, where they are present
    make bench-accuracy ARGS="--model DIR --calibration FILE --text FILE [--text FILE]"
    make bench-accuracy ARGS="--only llama --methods best,W8A8/*,hqq/*"
    make bench-accuracy ARGS="--list"

The rows are those of methods.yaml: ours, and settings of peers that are installed in venvs of their own (under
$PEERS_HOME or ~/.cache/bitgrain-peers). Each row is measured in a process of its own with one thread: quantized disk to
disk, loaded back from what was written, and compared with the base. Results are kept row by row in benchmarks/results;
rows that are there already, measured with the same model, texts and settings, are not measured again unless --again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy_methods import METHODS, Method, digest, file_digest, methods_of, read_methods, select
from accuracy_peers import View, absent, as_row, last_line, merge, unsuited
from accuracy_processes import Processes
from accuracy_report import Store, provenance
from accuracy_texts import Job, calibration_source, reference_jobs
from common import RESULTS, ROOT

CHILD = Path(__file__).with_name("accuracy_child.py")


@dataclass(frozen=True)
class Runner:
    """Measures the rows of one job, with temporary files in `scratch`."""

    job: Job
    scratch: Path
    timeout: float
    code: str
    processes: Processes

    @property
    def bases(self) -> list[Path]:
        """The base's sequences and log-probabilities on each text."""
        return [self.scratch / f"base-{i}.pt" for i in range(len(self.job.texts))]

    def base(self) -> list[dict[str, Any]]:
        """Run the unquantized model. Raises ValueError."""
        return self._child("base", {"what": "base"})["texts"]

    def row(self, method: Method, texts: Sequence[Mapping[str, Any]], view: View | None) -> dict[str, Any]:
        """Figures of one method, or why it failed."""
        about = {"name": method.name, "tool": method.tool, "key": key_of(method), **provenance()}
        try:
            if method.ours:
                return {**about, "code": self.code, **self._own(method)}
            assert view is not None
            answer = self.scratch / f"{digest(method.name)}.jsonl"
            record = view.run(self.processes, method.tool, method.settings["setting"], self.timeout, answer)
            return {**about, **as_row(record, self.job, texts)}
        except ValueError as error:
            return {**about, "failed": str(error)[:300]}

    def _own(self, method: Method) -> dict[str, Any]:
        out = self.scratch / f"out-{digest(method.name)}"
        request = {
            "what": "row",
            "settings": dict(method.settings),
            "calibration": str(calibration_source(self.job, self.scratch)),
            "out": str(out),
        }
        try:
            return self._child(digest(method.name), request)
        finally:
            for left in self.scratch.glob(f"{out.name}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _child(self, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """A process with one thread. Raises ValueError with its last words."""
        question, answer = self.scratch / f"{name}.request.json", self.scratch / f"{name}.answer.json"
        whole = {**request, "job": asdict(self.job), "files": self.bases}
        question.write_text(json.dumps(whole, default=str), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(CHILD), str(question), str(answer)]
        status, _, errors = self.processes.run(command, environment, self.timeout)
        if status:
            said = (
                last_line(errors)
                .removeprefix("ValueError: ")
                .replace(str(self.scratch), "TMP")
                .replace(str(ROOT.parent), "..")
            )
            raise ValueError(said or f"the process ended with {status}")
        return json.loads(answer.read_text(encoding="utf-8"))


def key_of(method: Method) -> str:
    """The same as long as a row's settings are."""
    return digest({"tool": method.tool, "settings": dict(method.settings)})


def choose(job: Job, arguments: argparse.Namespace) -> list[Method]:
    """The rows that are wanted for a job. Raises ValueError."""
    from bitgrain.recipes.recipe_file import named_recipes

    named = {name: path.read_text(encoding="utf-8") for name, path in named_recipes().items()}
    methods = methods_of(read_methods(arguments.methods_file), job.model.name, named)
    patterns = [pattern for pattern in (arguments.methods or "").split(",") if pattern]
    return [method for method in select(methods, patterns) if method.ours or not arguments.no_peers]


def measure(job: Job, arguments: argparse.Namespace) -> None:
    """All wanted rows of one job that are not there yet. Raises ValueError."""
    store = Store(arguments.results, f"accuracy-{job.model.name}", job.model.name, job.describe(), arguments.again)
    wanted = choose(job, arguments)
    away: dict[str, str] = {}
    for tool in dict.fromkeys(method.tool for method in wanted if not method.ours):
        if reason := unsuited(job) or absent(tool):
            away[tool] = reason
            say(f"{job.model.name}: {tool} skipped, {reason}")
    wanted = [method for method in wanted if method.tool not in away]
    todo = [method for method in wanted if arguments.again or not store.has(method.name, key_of(method))]
    say(f"{job.model.name}: {len(todo)} rows to measure, {len(wanted) - len(todo)} known")
    scratch = Path(tempfile.mkdtemp(prefix="bitgrain-bench-"))
    code = file_digest(*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "src").rglob("*.yaml")))
    runner = Runner(job, scratch, arguments.timeout, code, Processes())
    try:
        texts = runner.base()
        store.texts(texts)
        view = View(job, scratch / "view").make() if any(not method.ours for method in todo) else None
        calibration_source(job, scratch)

        def one(numbered: tuple[int, Method]) -> None:
            place, method = numbered
            began = time.monotonic()
            row = runner.row(method, texts, view)
            if runner.processes.stopped:
                return
            store.add(row)
            told = row.get("failed") or f"KL {next(iter(row['texts'].values()))['kl']:.5f}, {row['cpu_s']:.1f} CPU s"
            say(f"  {place}/{len(todo)} {method.name}: {told} ({time.monotonic() - began:.0f} s)")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            try:
                list(pool.map(one, enumerate(todo, 1)))
            finally:  # an interruption leaves some running
                runner.processes.stop()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if arguments.peers_results is not None:
        rows, notes = merge(arguments.peers_results, job, texts)
        for row in rows:
            store.merge({**row, "key": "", "from": arguments.peers_results.name})
        for note in notes:
            say(f"  {note}")
    store.write()
    print(store.page())


def say(line: str) -> None:
    """Progress, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def jobs_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Job]:
    """What to measure."""
    if arguments.model is None:
        found = reference_jobs(arguments.windows, arguments.documents, arguments.calibration_windows)
        chosen = [job for job in found if arguments.only in (None, job.model.name)]
        if not chosen:
            parser.error(f"--only names one of {', '.join(job.model.name for job in found)}")
        return chosen
    if arguments.calibration is None or not arguments.text:
        parser.error("--model needs --calibration and --text")
    windows = arguments.windows if arguments.document_mark is None else arguments.documents
    return [
        Job(
            arguments.model.resolve(),
            arguments.calibration,
            tuple(arguments.text),
            arguments.document_mark,
            arguments.seqlen,
            windows or (100 if arguments.document_mark is None else 200),
            arguments.calibration_windows,
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a model folder; without it, the reference models")
    add("--calibration", type=Path, help="the text that methods may learn from, for --model")
    add("--text", type=Path, action="append", default=[], help="an evaluation text; may be given several times")
    add("--document-mark", help="what parts the texts in documents, for instance '<|endoftext|>'; none: running text")
    add("--seqlen", type=int, default=512, help="tokens in a window, for --model")
    add("--windows", type=int, help="windows of each evaluation text (100)")
    add("--documents", type=int, help="the last so many documents of an evaluation text (200)")
    add("--calibration-windows", type=int, default=128)
    add("--only", help="of the reference models, only this one")
    add("--methods", help="names with commas between them: SCHEME/RECIPE, PEER/SETTING, or a part; * and ? match")
    add("--methods-file", type=Path, default=METHODS, help="rows other than those of methods.yaml")
    add("--no-peers", action="store_true", help="only our own methods")
    add("--peers-results", type=Path, help="a results.jsonl of the peers' harness, whose rows are shown too")
    add("--jobs", type=int, default=1, help="rows at a time; wall times and, a little, CPU seconds suffer")
    add("--timeout", type=float, default=3600, help="seconds after which a row is given up")
    add("--results", type=Path, default=RESULTS, help="where results are kept")
    add("--again", action="store_true", help="measure rows that are known already")
    add("--list", action="store_true", help="show the rows and stop")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that temporary files are removed
    try:
        for job in jobs_of(arguments, parser):
            if arguments.list:
                print(job.model.name, *(f"  {method.name}" for method in choose(job, arguments)), sep="\n")
            elif job.missing:
                say(f"{job.model.name}: skipped, {', '.join(job.missing)} not found")
            else:
                measure(job, arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
