"""Other tools, through the harness that measured them: each in its own venv, one process for each setting.

The harness has the texts of its own folder built in, and keeps caches by the model's name. So it is given a folder of
links in which texts, model and caches are those of this run; its figures then belong to the same sequences as ours,
which `as_row` checks by the base's perplexity.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_processes import Processes
from accuracy_texts import CALIBRATION_CHARACTERS, STORY_MARK, Job, last_documents
from common import SHARED

HARNESS = SHARED / "peers" / "harness"
SEQLEN, DOCUMENTS = 512, 200
"""Built into the harness."""
RUNNING, PARTED = ("held", "wt2"), ("stories",)
"""What it calls its texts."""
AGREE = 1e-3
"""Relative: two evaluations of one model in float32 are nearer than that, other texts are not."""


def peers_home() -> Path:
    """Where the venvs of the peers are."""
    return Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache" / "bitgrain-peers")


def absent(peer: str) -> str:
    """Why a peer cannot be measured here, or ""."""
    if not (HARNESS / "run.py").is_file():
        return "its harness is not here"
    venvs: Mapping[str, str] = runpy.run_path(str(HARNESS / "settings.py"))["VENV"]
    if peer not in venvs:
        return "the harness does not know it"
    python = peers_home() / "venvs" / venvs[peer] / "bin" / "python"
    return "" if python.exists() else "no venv of it is installed"


def unsuited(job: Job) -> str:
    """Why the harness cannot measure this job as we do, or ""."""
    if job.seqlen != SEQLEN:
        return f"the harness measures windows of {SEQLEN} tokens"
    if job.mark is not None and job.windows != DOCUMENTS:
        return f"the harness measures {DOCUMENTS} documents"
    return ""


@dataclass(frozen=True)
class View:
    """The harness as one job sees it, made of links in `folder`."""

    job: Job
    folder: Path

    def make(self) -> View:
        """Create the links. What the harness writes stays in the folder."""
        home, harness, text = self.folder / "home", self.folder / "peers" / "harness", self.folder / "text"
        for path in (home, harness, text, self.model.parent):
            path.mkdir(parents=True)
        for source in HARNESS.iterdir():
            if source.suffix in (".py", ".sh"):
                (harness / source.name).symlink_to(source.resolve())
        for source in peers_home().iterdir():
            if source.name not in ("work", "logs"):
                (home / source.name).symlink_to(source.resolve())
        self.model.symlink_to(self.job.model.resolve(), target_is_directory=True)
        texts = self.job.texts
        (text / "held").symlink_to(texts[0].resolve())
        (text / "wikitext2-test.raw").symlink_to(texts[min(1, len(texts) - 1)].resolve())
        if self.job.mark is not None:
            self._stories(text / "tinystories.txt")
        return self

    @property
    def model(self) -> Path:
        """Its name says to the harness whether texts are parted in documents."""
        return self.folder / "models" / ("model" if self.job.mark is None else "model-stories")

    def run(self, processes: Processes, peer: str, setting: str, timeout: float, answer: Path) -> dict[str, Any]:
        """The harness's own record of one setting. Raises ValueError if there is none."""
        job = self.job
        environment = {
            **os.environ,
            "PEERS_HOME": str(self.folder / "home"),
            "CALIB": str(job.calibration.resolve()),
            "HELD": str(self.folder / "text" / "held"),
            "NEV": str(job.windows),
            "NCAL": str(job.calibrate),
        }
        command = [sys.executable, str(self.folder / "peers" / "harness" / "run.py")]
        command += ["--model", str(self.model), "--peer", peer, "--setting", setting, "--results", str(answer)]
        command += ["--timeout", str(int(timeout))]
        # the harness stops what it measures after `timeout`; this is for the harness itself
        status, out, errors = processes.run(command, environment, 2 * timeout + 600)
        records = list(read_records(answer)) if answer.exists() else []
        if not records:
            raise ValueError(last_line(out + errors) or f"the harness ended with {status}")
        return records[-1]

    def _stories(self, out: Path) -> None:
        """One file whose beginning is calibration text and whose last documents are those of the evaluation."""
        job = self.job
        assert job.mark is not None
        if job.texts[0] == job.calibration and job.mark == STORY_MARK:
            out.symlink_to(job.calibration.resolve())
            return
        shown = job.calibration.read_text(encoding="utf-8").replace(job.mark, STORY_MARK)[:CALIBRATION_CHARACTERS]
        documents = last_documents(job.texts[0].read_text(encoding="utf-8"), job.mark, DOCUMENTS)
        out.write_text(STORY_MARK.join([shown, *documents, "cut off"]), encoding="utf-8")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results.jsonl."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def last_line(output: str) -> str:
    """The last line that says anything."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def as_row(record: Mapping[str, Any], job: Job, texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of the harness as a row of ours; `texts`: name and base perplexity of each of the job's texts.

    Raises ValueError: the setting failed, or was measured on another model or other texts.
    """
    if not record.get("ok"):
        raise ValueError(" ".join(str(record.get("error", "no message")).split()))
    figures: dict[str, Any] = {}
    for name, text in zip(PARTED if job.mark else RUNNING, texts):
        found = record["eval"].get(name)
        if found is None or abs(found["base_ppl"] / text["base_perplexity"] - 1) > AGREE:
            raise ValueError(f"it was measured on another model, or on something else than {text['text']}")
        figures[text["text"]] = {
            "kl": found["kl"],
            "kl_p99": None,
            "top1": found["top1"],
            "perplexity": found["ppl"],
            "base_perplexity": found["base_ppl"],
            "tokens": found["tokens"],
        }
    return {
        "bits": record["bpw"],
        "bits_stored": None,
        "activations": acts(record["peer"], record["setting"]),
        "cpu_s": record.get("cpu_s"),
        "wall_s": record.get("quant_s"),
        "peak_rss_mb": record.get("rss_mb"),
        "texts": figures,
    }


def acts(peer: str, setting: str) -> bool:
    """Whether activations are quantized; bitsandbytes' int8 is weight-only on a CPU."""
    return peer != "bnb" and any(part in setting for part in ("a8", "fp8-dynamic", "int8dq", "fp8dq", "int8da"))


def merge(path: Path, job: Job, texts: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a results.jsonl that belong to this job (the latest of each setting), and notes on the others."""
    latest: dict[str, dict[str, Any]] = {}
    for record in read_records(path):
        same = record.get("model") == job.model.name and record.get("ncal") == job.calibrate
        if same and (job.mark is not None or record.get("nev") == job.windows) and record.get("peer") != "none":
            latest[f"{record['peer']}/{record['setting']}"] = record
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, record in latest.items():
        try:
            rows.append({"name": name, "tool": record["peer"], **as_row(record, job, texts)})
        except ValueError as error:
            notes.append(f"{name}: {error}")
    if not latest:
        notes.append(f"{path.name} holds nothing of {job.model.name} with these windows")
    return rows, notes
