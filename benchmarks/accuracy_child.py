"""One measurement in a process of its own: `accuracy_child.py REQUEST.json ANSWER.json`.

base  the unquantized model on the texts: its log-probabilities go to a file that every row reads
row   quantize, note CPU time and memory, load what was written, and compare it with the base
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import torch
from accuracy_texts import Job, sequences
from common import resident_bytes
from torch import Tensor, nn

KEEP_BYTES = 4_000_000_000
"""Of log-probabilities for each text; above it the base is run again for every row."""

OURS = ("base", "text", "calibrated")
"""Keys of methods.yaml that are no keys of a recipe."""
Base = Callable[[int], Tensor]
"""Log-probabilities float32 [tokens, vocabulary] of the base on sequence i."""


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """float32 [tokens, vocabulary] of ids int64 [tokens]. Raises ValueError for NaN."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), dim=-1)
    if bool(log_p[:, 0].isnan().any()):
        raise ValueError("the model gives NaN or infinite logits")
    return log_p


def compare(model: nn.Module, ids: Sequence[Tensor], base: Base) -> dict[str, float]:
    """KL(base || model) in nats per token, its 99th percentile, top-1 agreement, and both perplexities.

    As `bitgrain.evaluation.language` defines them, but for sequences of any lengths: every token counts the same.
    """
    kl: list[float] = []
    nll: list[float] = []
    base_nll: list[float] = []
    agree = 0
    for i, sequence in enumerate(ids):
        log_p, log_q = base(i), log_probabilities(model, sequence)
        p = log_p.exp()
        terms = (log_p - log_q).masked_fill_(p == 0, 0.0).mul_(p)
        kl += terms.sum(dim=-1, dtype=torch.float64).tolist()
        agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        nll += next_token_nll(log_q, sequence)
        base_nll += next_token_nll(log_p, sequence)
    return {
        "kl": math.fsum(kl) / len(kl),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": agree / len(kl),
        "perplexity": perplexity(nll),
        "base_perplexity": perplexity(base_nll),
        "tokens": len(kl),
    }


def next_token_nll(log_p: Tensor, sequence: Tensor) -> list[float]:
    """Of every token that has a past."""
    return (-log_p[:-1].gather(-1, sequence[1:, None])[:, 0]).tolist()


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean, infinite where that is beyond float64."""
    mean = math.fsum(nll) / len(nll)
    return math.exp(mean) if mean < 709 else math.inf


def cpu_seconds() -> float:
    """User and system time of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_base(job: Job, files: Sequence[Path]) -> dict[str, Any]:
    """Write one file for each text: its sequences and, if they fit, the base's log-probabilities."""
    from bitgrain.api import load
    from bitgrain.calibration.text import load_tokenizer

    model = load(job.model, device="cpu")
    tokenizer = load_tokenizer(job.model)
    texts: list[dict[str, Any]] = []
    for text, file in zip(job.texts, files, strict=True):
        ids = [torch.tensor(one, dtype=torch.int64) for one in sequences(job, text, tokenizer)]
        kept: list[Tensor] = []
        nll: list[float] = []
        fits = True
        for sequence in ids:
            log_p = log_probabilities(model, sequence)
            nll += next_token_nll(log_p, sequence)
            fits = fits and log_p.nbytes * len(ids) <= KEEP_BYTES
            kept = [*kept, log_p] if fits else []
        torch.save({"ids": ids, "log_p": kept}, file)
        tokens = sum(len(sequence) for sequence in ids)
        texts.append({"text": text.name, "sequences": len(ids), "tokens": tokens, "base_perplexity": perplexity(nll)})
    return {"texts": texts}


def run_row(job: Job, settings: dict[str, Any], calibration: Path, files: Sequence[Path], out: Path) -> dict[str, Any]:
    """Quantize into `out` as `settings` say (see `accuracy_methods.Method`), and measure the result."""
    from bitgrain.api import load

    row = quantize_row(job, settings, calibration, out)
    model = load(out, device="cpu", execution="dequantize")
    row["texts"] = {}
    original: nn.Module | None = None
    for text, file in zip(job.texts, files, strict=True):
        known = torch.load(file, mmap=True, weights_only=True)
        ids, kept = known["ids"], known["log_p"]
        if not kept:
            original = original or load(job.model, device="cpu")
        row["texts"][text.name] = compare(model, ids, kept.__getitem__ if kept else rerun(original, ids))
    return row


def rerun(original: nn.Module | None, ids: Sequence[Tensor]) -> Base:
    """The base run again, where its log-probabilities were too many to keep."""
    assert original is not None
    return lambda i: log_probabilities(original, ids[i])


def quantize_row(job: Job, settings: dict[str, Any], calibration: Path, out: Path) -> dict[str, Any]:
    """Quantize, and what it cost; imports are not counted, reading the model is."""
    from bitgrain.api import quantize
    from bitgrain.numerics.formats import FP16
    from bitgrain.recipes import load_recipe, make_recipe

    keys = {key: value for key, value in settings["recipe"].items() if key not in OURS}
    # activations of a mixed recipe are those of its scheme: none
    keys["scheme"] = settings.get("scheme", "W8A16")
    shown = {"text": str(calibration), "windows": job.calibrate, "seqlen": job.seqlen}
    keys["calibration"] = {**shown, **keys.get("calibration", {})}
    keys["on_indivisible"] = "skip" if "FP4" in str(keys["scheme"]) else "channel"
    base = settings["recipe"].get("base")
    recipe = make_recipe(**keys) if base is None else load_recipe(base, **keys)
    began, used = time.perf_counter(), cpu_seconds()
    result = quantize(job.model, out, recipe=recipe, bits=settings.get("bits"), workers=1, device="cpu",
                      engine=settings.get("engine", "compressed-tensors"))  # fmt: skip
    cost = {"cpu_s": cpu_seconds() - used, "wall_s": time.perf_counter() - began}
    if settings["recipe"].get("calibrated") and result.plan.calibration is None:
        raise ValueError("no calibration text was read, so this is not the method that its name says")
    layers = list(result.plan.quantized.values())
    elements = sum(layer.elements for layer in layers)
    sizes = [
        layer.experts * layer.scheme.weight.with_scale_dtype(FP16).count_bits(tuple(layer.shape)) for layer in layers
    ]
    changed = [planned.note for planned in result.plan.layers if planned.note]
    return {
        "bits": sum(sizes) / elements,
        "bits_stored": result.plan.bits_per_weight,
        "layout": result.plan.layout.name,
        "calibrated": result.plan.calibration is not None,
        "activations": any(layer.scheme.input is not None for layer in layers),
        **cost,
        "peak_rss_mb": resident_bytes("VmHWM") / 1e6,
        "not_as_asked": changed[0] if changed else "",
    }


def main() -> None:
    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    described = request["job"]
    job = Job(
        Path(described["model"]),
        Path(described["calibration"]),
        tuple(Path(text) for text in described["texts"]),
        **{key: described[key] for key in ("mark", "seqlen", "windows", "calibrate")},
    )
    files = [Path(file) for file in request["files"]]
    if request["what"] == "base":
        answer = run_base(job, files)
    else:
        answer = run_row(job, request["settings"], Path(request["calibration"]), files, Path(request["out"]))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
