"""Jobs and generation on a GPU: seconds, GPU memory, and whether the CPU finds the same.

    make bench-gpu                       # 1.1 billion random parameters, 22 blocks
    make bench-gpu ARGS="--whole 8 --blocks 1 --minutes 2"  # smaller models, and as many methods as there is time for
    make bench-gpu ARGS="--device cpu"   # the same jobs without a GPU, to try the benchmark itself

Everything runs in this process, one after the other. GPU memory is the largest that torch had allocated during a job.
Models are of random weights: a method's error says whether two devices agree, not what the method is worth.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import ROOT, machine_line, random_llama, write_results
from gpu_report import ROUNDED, report
from safetensors import safe_open

import bitgrain
from bitgrain.demo import demo_model_path
from bitgrain.errors import BitgrainError
from bitgrain.recipes import make_recipe
from bitgrain.runtime.device import resolve_device

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    ROUNDED: ("W4A16", {"solver": "rtn"}),
    "RTN NVFP4A16": ("NVFP4A16", {"solver": "rtn"}),
    "GPTQ W4A16": ("W4A16", {"solver": {"name": "gptq", "order": "act"}}),
    "AWQ W4A16_ASYM": ("W4A16_ASYM", {"solver": "rtn", "transforms": ["awq"]}),
    "SmoothQuant W8A8": ("W8A8", {"solver": "rtn", "transforms": [{"name": "smoothquant", "alpha": 0.8}]}),
    "AutoRound W4A16": ("W4A16", {"solver": "rtn", "tuning": {"blockwise": {"steps": 50}}}),
}
PROMPT = 32
"""Tokens before those that are generated."""


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measured(device: str, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` gives, its seconds, and the GPU memory that it took at most beyond what was held before."""
    gpu = device != "cpu"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if gpu else 0
    began = time.perf_counter()
    found = work()
    synchronize(device)
    seconds = time.perf_counter() - began
    return found, {"seconds": seconds, "gpu_bytes": torch.cuda.max_memory_allocated() - held if gpu else 0}


def quantized(model: Path, out: Path, method: str, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One job, and the mean error of its layers."""
    scheme, recipe = METHODS[method]
    if set(recipe) != {"solver"} or recipe["solver"] != "rtn":
        recipe = {**recipe, "calibration": {"windows": arguments.windows, "seqlen": arguments.seqlen}}
    made = make_recipe(scheme=scheme, **recipe)
    result, figures = measured(device, lambda: bitgrain.quantize(model, out, recipe=made, device=device))
    layers = [layer for layer in result.manifest["layers"] if layer["scheme"]]
    losses = [layer["figures"]["loss"] for layer in layers if layer.get("figures")]
    return {
        **figures,
        "layers": len(layers),
        "sqnr_db": sum(layer["sqnr_db"] for layer in layers) / len(layers),
        "loss": sum(losses) / len(losses) if losses else None,
    }


def equal_share(one: Path, other: Path) -> float:
    """Of the numbers in two checkpoints, how many have the same bits."""
    equal = total = 0
    for path in sorted(one.glob("*.safetensors")):
        with safe_open(path, "pt") as mine, safe_open(other / path.name, "pt") as theirs:
            for name in mine.keys():  # noqa: SIM118
                a, b = (file.get_tensor(name).contiguous().view(-1).view(torch.uint8) for file in (mine, theirs))
                equal, total = equal + int((a == b).sum()), total + a.numel()
    return equal / total


def generated(load: Callable[[], Any], device: str, tokens: int) -> dict[str, Any]:
    """Tokens a second of one text, the second time; the memory of the model, and of model and generation."""
    model, loading = measured(device, load)
    held = torch.cuda.memory_allocated() if device != "cpu" else 0
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=4, **options)
    found, figures = measured(device, lambda: model.generate(ids, max_new_tokens=tokens, **options))
    with torch.inference_mode():
        logits = model(input_ids=found).logits.float().cpu()
    return {
        "load_seconds": loading["seconds"],
        "tokens_per_second": tokens / figures["seconds"],
        "model_bytes": held,
        "peak_bytes": held + figures["gpu_bytes"],
        "finite": bool(logits.isfinite().all()),
    }


def job(model: Path, scratch: Path, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A method on the GPU, and where it is asked for on the CPU."""
    out = scratch / method.replace(" ", "-")
    try:
        found: dict[str, Any] = {"gpu": quantized(model, out, method, arguments.device, arguments)}
        if any(part and part in method for part in arguments.on_cpu.split(",")):
            found["cpu"] = quantized(model, scratch / "cpu", method, "cpu", arguments)
            found["equal"] = equal_share(out, scratch / "cpu")
            shutil.rmtree(scratch / "cpu")
    except BitgrainError as error:
        found = {"error": str(error)}
    print(f"{method}: {found}", file=sys.stderr, flush=True)
    return found


def generations(model: Path, packed: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The original, and the two ways to run packed weights without kernels."""
    settings: dict[str, Any] = {"device": arguments.device, "dtype": torch.bfloat16}
    loads: dict[str, Callable[[], Any]] = {
        "bfloat16, as it was": lambda: bitgrain.load(model, **settings),
        "W4A16, dequantized when loaded": lambda: bitgrain.load(packed, execution="dequantize", **settings),
        "W4A16, dequantized for each product": lambda: bitgrain.load(packed, low_bit=True, **settings),
    }
    found: dict[str, Any] = {}
    for name, load in loads.items():
        found[name] = generated(load, arguments.device, arguments.tokens)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def measure(whole: Path, part: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounding and generation with `whole`, then as many of the other methods as there is time for, on `part`."""
    torch.ones(64, 64, device=arguments.device).mm(torch.ones(64, 64, device=arguments.device))  # libraries are loaded
    until = time.monotonic() + 60 * arguments.minutes
    jobs = {ROUNDED: job(whole, scratch, ROUNDED, arguments)}
    generation = generations(whole, scratch / ROUNDED.replace(" ", "-"), arguments)
    for method in (name for name in METHODS if name != ROUNDED):
        if time.monotonic() < until:
            jobs[method] = job(part, scratch, method, arguments)
    return {"jobs": jobs, "generation": generation}


def model_of(blocks: int) -> Path:
    """A random model, with the tokenizer of the built-in one."""
    model = random_llama(ROOT / "build" / f"random-llama-{blocks}", blocks=blocks)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, model / name)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--whole", type=int, default=22, help="blocks of the model that is rounded and generates")
    parser.add_argument("--blocks", type=int, default=22, help="of the model on which the other methods run")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further method is begun")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="that are generated")
    parser.add_argument("--on-cpu", default="RTN,GPTQ", help="methods that the CPU repeats, with commas between them")
    parser.add_argument("--name", default="gpu", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    try:
        arguments.device = str(resolve_device(arguments.device))
    except BitgrainError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="bitgrain-bench-") as scratch:
        found = measure(model_of(arguments.whole), model_of(arguments.blocks), Path(scratch), arguments)
    gpu = torch.cuda.get_device_name() if arguments.device != "cpu" else "no GPU"
    settings = {key: getattr(arguments, key) for key in ("device", "whole", "blocks", "windows", "seqlen", "tokens")}
    data = {"gpu": gpu, "settings": settings, **found}
    write_results(arguments.name, data, report(data, machine_line()))


if __name__ == "__main__":
    main()
