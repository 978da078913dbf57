"""Time and memory of calibrated quantization on a model that is larger than a machine would hold in float32.

    make bench-streaming                   # fast, W4A16, 1.1 billion random parameters, 32 x 512 tokens
    make bench-streaming ARGS="--recipe balanced --scheme W4A8"
    make bench-streaming ARGS="--model DIR --calibration FILE --windows 128"

The job runs in a process of its own; peak memory is all of it, Python and torch included. A model without a tokenizer
is read with that of the built-in one: its text then says nothing, which costs the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, machine_line, random_llama, resident_bytes, table, write_results

MODEL = ROOT / "build" / "random-llama-1.1b"
MB = 1e6
MINUTES_BAR, PEAK_BAR_MB = 25, 4000


def quantize_here(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize in this process, which has done nothing else before."""
    from bitgrain.pipeline.planning import make_plan
    from bitgrain.pipeline.quantize import run_plan
    from bitgrain.progress import make_progress
    from bitgrain.recipes import load_recipe

    calibration = {"text": request["calibration"], "windows": request["windows"], "seqlen": request["seqlen"]}
    recipe = load_recipe(request["recipe"], scheme=request["scheme"], calibration=calibration)
    plan = make_plan(request["model"], recipe, workers=request["workers"])
    began = time.perf_counter()
    result = run_plan(plan, Path(request["out"]), device="cpu", progress=make_progress("rich"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    ratios = [x["figures"]["loss"] / x["figures"]["rtn_loss"] for x in result.manifest["layers"] if x.get("figures")]
    return {
        **request,
        "wall_s": time.perf_counter() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": resident_bytes("VmHWM") / MB,
        "predicted_peak_mb": plan.peak_ram / MB,
        "bytes_read": plan.bytes_before,
        "written_bytes": sum(path.stat().st_size for path in Path(request["out"]).glob("model*")),
        "layers": len(plan.quantized),
        "mean_loss_of_rtn": sum(ratios) / len(ratios),
    }


def prepared(model: Path) -> Path:
    """`model`, made where it is absent, with a tokenizer."""
    if not (random_llama(model) / "tokenizer.json").exists():
        from bitgrain.demo import demo_model_path

        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model_path() / name, model / name)
    return model


def report(run: dict[str, Any]) -> str:
    """The Markdown page."""
    header = ["recipe", "scheme", "tokens", "wall min", "CPU min", "peak MB", "predicted MB", "loss, of rtn's"]
    row = [
        run["recipe"],
        run["scheme"],
        f"{run['windows']} x {run['seqlen']}",
        f"{run['wall_s'] / 60:.1f}",
        f"{run['cpu_s'] / 60:.1f}",
        f"{run['peak_mb']:.0f}",
        f"{run['predicted_peak_mb']:.0f} above Python and torch",
        f"{run['mean_loss_of_rtn']:.2f}",
    ]
    return (
        "# Time and memory of calibrated quantization\n\n"
        f"{machine_line()}. {run['workers']} workers; {run['bytes_read'] / MB:.0f} MB of weights, {run['layers']} "
        f"layers, {run['written_bytes'] / MB:.0f} MB written.\n\n"
        + table(header, [row])
        + f"\n- bar: below {MINUTES_BAR} minutes: {'met' if run['wall_s'] < 60 * MINUTES_BAR else 'MISSED'}; "
        f"peak below {PEAK_BAR_MB} MB: {'met' if run['peak_mb'] < PEAK_BAR_MB else 'MISSED'}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="made by tools/make_random_llama.py if absent")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="streaming", help="of the files in benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(quantize_here(json.loads(arguments.child))))
        return
    names = ("recipe", "scheme", "calibration", "windows", "seqlen", "workers")
    request = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="bitgrain-bench-") as scratch:
        request |= {"model": str(prepared(arguments.model)), "out": str(Path(scratch) / "out")}
        command = [sys.executable, __file__, "--child", json.dumps(request)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    run = json.loads(done.stdout.splitlines()[-1])
    run |= {"model": arguments.model.name, "out": None}
    write_results(arguments.name, {"run": run}, report(run))


if __name__ == "__main__":
    main()
