"""What every preset costs in accuracy: KL divergence, top-1 agreement and perplexity against the unquantized model.

    make bench-accuracy                                              # the reference models, where they are present
    make bench-accuracy ARGS="--model DIR --text FILE [--text FILE]" # any model and text
    make bench-accuracy ARGS="--only llama --schemes W4A16,NVFP4"

Each scheme is quantized disk to disk (round to nearest, min-max ranges) in a process of its own, loaded back from what
was written, and compared with the base on windows that do not overlap. The text is tokenized with the special tokens
that the tokenizer adds, once in front of the whole (usually one BOS): then base perplexities are those of other tools'
tables. The base is run once for each text; its logits are kept where they fit into memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, SHARED, machine_line, resident_bytes, table, write_results

SCHEMES = (
    *("W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16"),
    *("W8A8", "INT8_TENSOR", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4"),
)
END_OF_STORY = "<|endoftext|>"


@dataclass(frozen=True)
class Text:
    """A text file and how much of it is read."""

    path: Path
    seqlen: int
    windows: int
    stories: int | None = None
    """Of a file of stories, the last so many complete ones, tokenized one by one and put end to end."""

    def read(self, tokenizer: Any) -> Any:
        """Windows int64 [n, seqlen]."""
        from bitgrain.calibration.text import read_text, token_windows

        content = read_text(self.path)
        if self.stories is None:
            return token_windows(tokenizer, content, self.seqlen, self.windows, special_tokens=True)
        import torch

        found = [story.strip() for story in content.split(END_OF_STORY)[:-1] if story.strip()][-self.stories :]
        ids = [i for story in found for i in tokenizer(story, add_special_tokens=True, truncation=False)["input_ids"]]
        count = min(self.windows, len(ids) // self.seqlen)
        return torch.tensor(ids[: count * self.seqlen], dtype=torch.int64).view(count, self.seqlen)


@dataclass(frozen=True)
class Job:
    """One model on its texts."""

    model: Path
    texts: tuple[Text, ...]

    @property
    def missing(self) -> list[str]:
        """What is not there."""
        return [path.name for path in (self.model, *(text.path for text in self.texts)) if not path.exists()]


def reference_jobs(windows: int | None) -> list[Job]:
    """The shared reference models, each on text it was trained for and, the large ones, on another domain."""
    models, texts = SHARED / "models", SHARED / "text"

    def text(name: str, seqlen: int, count: int, stories: int | None = None) -> Text:
        return Text(texts / name, seqlen, min(count, windows or count), stories)

    held = "heldout.txt"
    wiki = "wikitext2-test.raw"
    stories = "tinystories.txt"
    return [
        Job(models / "llama", (text(held, 512, 100), text(wiki, 512, 40))),
        Job(models / "llama-outliers", (text(held, 512, 40), text(wiki, 512, 40))),
        Job(models / "tinystories-656k", (text(stories, 512, 100, 200),)),
        Job(models / "stories260k", (text(stories, 256, 100, 200),)),
    ]


def quantize_here(model: Path, out: Path, scheme: str) -> dict[str, Any]:
    """Quantize in this process; what cannot be divided into groups falls back to channels, FP4 to full precision."""
    from bitgrain.api import quantize

    began = time.perf_counter()
    fallback = "skip" if "FP4" in scheme else "channel"
    result = quantize(model, out, scheme, device="cpu", on_indivisible=fallback)
    plan = result.plan
    changed = [planned for planned in plan.layers if planned.note]
    return {
        "bits_per_weight": plan.bits_per_weight,
        "bytes_after": plan.bytes_after,
        "layout": plan.layout.name,
        "quantize_s": time.perf_counter() - began,
        "peak_rss_mb": resident_bytes("VmHWM") / 1e6,
        "layers": len(plan.quantized),
        "layers_not_as_asked": len(changed),
        "not_as_asked": f"{changed[0].note}" if changed else "",
    }


def run(job: Job, schemes: list[str], scratch: Path) -> dict[str, Any]:
    """All schemes of one model."""
    from bitgrain.api import load
    from bitgrain.calibration.text import load_tokenizer
    from bitgrain.evaluation.language import evaluate_model, record_base

    base = load(job.model, device="cpu")
    words = load_tokenizer(job.model)
    references: list[Any] = []
    for text in job.texts:
        references.append(record_base(base, text.read(words)))
        print(f"{job.model.name} on {text.path.name}: base perplexity {references[-1].perplexity:.3f}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for scheme in schemes:
        out = scratch / scheme
        command = [sys.executable, __file__, "--child", scheme, "--model", str(job.model), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append({"scheme": scheme, "failed": reason.split(": ", 1)[-1]})
            print(f"  {scheme}: {reason}", file=sys.stderr)
            continue
        row: dict[str, Any] = {"scheme": scheme, **json.loads(done.stdout.splitlines()[-1]), "texts": {}}
        module = load(out, device="cpu")
        for text, reference in zip(job.texts, references, strict=True):
            row["texts"][text.path.name] = evaluate_model(module, reference.windows, base=reference).to_json()
        shutil.rmtree(out)
        rows.append(row)
        first = row["texts"][job.texts[0].path.name]
        print(f"  {scheme}: KL {first['kl']:.5f}, perplexity {first['perplexity']:.3f}", file=sys.stderr)
    texts = [
        {
            "text": text.path.name,
            "seqlen": text.seqlen,
            "windows": len(r.windows),
            "stories": text.stories,
            "base_perplexity": r.perplexity,
        }
        for text, r in zip(job.texts, references, strict=True)
    ]
    return {"model": job.model.name, "texts": texts, "schemes": rows}


def report(result: dict[str, Any]) -> str:
    """The Markdown page of one model."""
    header = ["scheme", "bits per weight"]
    for text in result["texts"]:
        header += [f"{text['text']}: KL", "KL p99", "top-1", "perplexity"]
    header += ["quantize s", "peak RSS MB"]
    rows: list[list[str]] = []
    for row in result["schemes"]:
        if "failed" in row:
            rows.append([row["scheme"], row["failed"], *[""] * (len(header) - 2)])
            continue
        cells = [row["scheme"] + ("*" if row["layers_not_as_asked"] else ""), f"{row['bits_per_weight']:.3f}"]
        for text in result["texts"]:
            e = row["texts"][text["text"]]
            cells += [f"{e['kl']:.2g}" if e["kl"] < 1e-4 else f"{e['kl']:.5f}", f"{e['kl_p99']:.2g}"]
            cells += [f"{100 * e['top1']:.1f} %", f"{e['perplexity']:.3f}"]
        rows.append([*cells, f"{row['quantize_s']:.1f}", f"{row['peak_rss_mb']:.0f}"])
    about = "".join(
        f"- {text['text']}: {text['windows']} windows of {text['seqlen']} tokens, "
        f"base perplexity {text['base_perplexity']:.3f}"
        + (f"; from the last {text['stories']} stories, one after the other" if text["stories"] else "")
        + "\n"
        for text in result["texts"]
    )
    notes = {row["not_as_asked"] for row in result["schemes"] if row.get("not_as_asked")}
    return (
        f"# Accuracy of the presets on {result['model']}\n\n"
        f"{machine_line()}. Round to nearest with min-max ranges; decoder linears only, embeddings, norms and lm_head "
        "as they were. KL(base || quantized) in nats per token; bits per weight with scales as stored; activations "
        "quantized in simulation, as vLLM rounds them.\n\n"
        + about
        + "- tokenized with special tokens: one BOS in front of the whole text, or of each story, where there is one\n"
        "- quantize s: the whole job; peak RSS: of that process, Python and torch included\n\n"
        + table(header, rows)
        + "".join(f"\n\\* not every layer as asked, for instance {note}" for note in sorted(notes)[:1])
    ).rstrip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; without it, the reference models")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="a text file; may be given several times"
    )
    parser.add_argument("--only", help="of the reference models, only this one")
    parser.add_argument("--schemes", default="all", help="names with commas between them")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window, for --text")
    parser.add_argument("--windows", type=int, default=None, help="at most so many windows of each text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(quantize_here(arguments.model, arguments.out, arguments.child)))
        return
    if arguments.model is None:
        jobs = [j for j in reference_jobs(arguments.windows) if arguments.only in (None, j.model.name)]
    elif arguments.text:
        texts = tuple(Text(path, arguments.seqlen, arguments.windows or 100) for path in arguments.text)
        jobs = [Job(arguments.model, texts)]
    else:
        parser.error("--model needs --text")
    schemes = list(SCHEMES) if arguments.schemes == "all" else arguments.schemes.split(",")
    for job in jobs:
        if job.missing:
            print(f"{job.model.name}: skipped, {', '.join(job.missing)} not found beside {ROOT.name}", file=sys.stderr)
            continue
        scratch = Path(tempfile.mkdtemp(prefix="bitgrain-bench-"))
        try:
            result = run(job, schemes, scratch)
        finally:
            shutil.rmtree(scratch)
        write_results(f"accuracy-{job.model.name}", result, report(result))


if __name__ == "__main__":
    main()
