"""How much memory and time the disk-to-disk job takes on a checkpoint larger than its memory allowance.

    make bench-memory                                       # W4A16 on 1.1 billion random parameters, two workers
    make bench-memory ARGS="--schemes all"                  # the other presets too
    make bench-memory ARGS="--model DIR --workers 4"

Every scheme runs in a process of its own. Peak memory is the process's largest resident set, less what it held after
`import torch, transformers`; MB/s counts every byte of weights that is read, over the wall time of the whole job:
reading, rounding, measuring, writing, hashing and fsync. The source's pages are dropped from the page cache before each
run (`posix_fadvise`), unless --warm is given; the disk's own speed, measured the same way, stands beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
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
SCHEMES = ("W4A16", "W4A16_ASYM", "W3A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "NVFP4A16")
PEAK_BAR_MB, SPEED_BAR_MB_S = 1200, 100
PROBE_BYTES = 512_000_000
MB = 1e6


def quantize_here(model: Path, out: Path, scheme: str, workers: int) -> dict[str, Any]:
    """Quantize in this process, which has done nothing else before."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    baseline = resident_bytes("VmRSS")
    from bitgrain.pipeline.planning import make_plan
    from bitgrain.pipeline.quantize import run_plan
    from bitgrain.recipes import make_recipe

    began = time.perf_counter()
    plan = make_plan(model, make_recipe(scheme=scheme), workers=workers)
    planned = time.perf_counter()
    before_run = resident_bytes("VmRSS")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = run_plan(plan, out, device="cpu")
    wall = time.perf_counter() - planned
    after = resource.getrusage(resource.RUSAGE_SELF)
    written = sum(path.stat().st_size for path in out.glob("model*"))
    quantized = sum(layer.elements * layer.dtype.itemsize for layer in plan.quantized.values())
    return {
        "scheme": scheme,
        "workers": workers,
        "plan_s": planned - began,
        "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
        "bytes_read": plan.bytes_before,
        "bytes_quantized": quantized,
        "mb_per_s": plan.bytes_before / MB / wall,
        "baseline_mb": baseline / MB,
        "planned_rss_mb": (before_run - baseline) / MB,
        "peak_mb": (resident_bytes("VmHWM") - baseline) / MB,
        "predicted_peak_mb": plan.peak_ram / MB,
        "predicted_bytes": plan.bytes_after,
        "written_bytes": written,
        "layers": len(plan.quantized),
        "worst_sqnr_db": min(x["sqnr_db"] for x in result.manifest["layers"] if x.get("sqnr_db") is not None),
    }


def drop_from_cache(folder: Path) -> None:
    """Make the next read of the folder's files come from the disk."""
    for path in folder.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def disk_limits(model: Path, scratch: Path) -> dict[str, float]:
    """MB/s of one thread: reading the largest weight file cold, and writing new bytes with an fsync."""
    largest = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    drop_from_cache(model)
    buffer = bytearray(8 << 20)
    began, got = time.perf_counter(), 0
    with largest.open("rb", buffering=0) as file:
        while (n := file.readinto(buffer)) and got < PROBE_BYTES:
            got += n
    read = got / MB / (time.perf_counter() - began)
    data = os.urandom(8 << 20)
    probe = scratch / "probe"
    began, put = time.perf_counter(), 0
    with probe.open("wb", buffering=0) as file:
        while put < PROBE_BYTES:
            put += file.write(data)
        os.fsync(file.fileno())
    write = put / MB / (time.perf_counter() - began)
    probe.unlink()
    return {"read_mb_per_s": read, "write_mb_per_s": write}


def measure(model: Path, scheme: str, workers: int, scratch: Path, warm: bool) -> dict[str, Any]:
    """`quantize_here` in a fresh process."""
    if warm:
        for path in model.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(8 << 20):
                    pass
    else:
        drop_from_cache(model)
    out = scratch / scheme
    command = [sys.executable, __file__, "--child", scheme, "--model", str(model), "--out", str(out)]
    done = subprocess.run([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    return {**json.loads(done.stdout.splitlines()[-1]), "page_cache": "warm" if warm else "cold"}


def report(results: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """The Markdown page."""
    header = [
        "scheme",
        "read MB/s",
        "wall s",
        "CPU s",
        "peak MB",
        "predicted MB",
        "written MB",
        "as predicted",
        "SQNR dB",
    ]
    rows = [
        [
            r["scheme"],
            f"{r['mb_per_s']:.0f}",
            f"{r['wall_s']:.1f}",
            f"{r['cpu_s']:.1f}",
            f"{r['peak_mb']:.0f}",
            f"{r['predicted_peak_mb']:.0f}",
            f"{r['written_bytes'] / MB:.1f}",
            "to the byte" if r["written_bytes"] == r["predicted_bytes"] else f"{r['predicted_bytes'] / MB:.1f}",
            f"{r['worst_sqnr_db']:.1f}",
        ]
        for r in results
    ]
    first = results[0]
    verdict = [
        f"- peak memory of {r['scheme']} above Python, torch and transformers: {r['peak_mb']:.0f} MB "
        f"(bar: below {PEAK_BAR_MB} MB): {'met' if r['peak_mb'] < PEAK_BAR_MB else 'MISSED'}\n"
        f"- speed of {r['scheme']}: {r['mb_per_s']:.0f} MB/s (bar: at least {SPEED_BAR_MB_S} MB/s): "
        f"{'met' if r['mb_per_s'] >= SPEED_BAR_MB_S else 'MISSED'}\n"
        for r in results
        if r["scheme"] == "W4A16"
    ]
    return (
        "# Memory and speed of the disk-to-disk job\n\n"
        f"{machine_line()}. Round to nearest, {first['workers']} workers of one thread each; "
        f"{first['bytes_read'] / MB:.0f} MB of weights are read, of which {first['bytes_quantized'] / MB:.0f} MB are "
        f"quantized; page cache {first['page_cache']} for the source.\n\n"
        + table(header, rows)
        + "\n- peak MB: largest resident set, less that after `import torch, transformers` "
        f"({first['baseline_mb']:.0f} MB); predicted MB: what `bitgrain plan` says\n"
        "- wall: the whole job with hashing and fsync, without imports; SQNR: of the worst layer\n"
        f"- this disk, one thread, in the same run: reads {limits['read_mb_per_s']:.0f} MB/s cold, "
        f"writes {limits['write_mb_per_s']:.0f} MB/s with fsync\n" + "".join(verdict)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="made by tools/make_random_llama.py if absent")
    parser.add_argument("--schemes", default="W4A16", help="names with commas between them, or all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="read the source into the page cache first")
    parser.add_argument("--scratch", type=Path, default=None, help="where outputs go and are removed again")
    parser.add_argument("--name", default="memory", help="of the files in benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(quantize_here(arguments.model, arguments.out, arguments.child, arguments.workers)))
        return
    random_llama(arguments.model)
    schemes = SCHEMES if arguments.schemes == "all" else tuple(arguments.schemes.split(","))
    scratch = Path(tempfile.mkdtemp(prefix="bitgrain-bench-", dir=arguments.scratch))
    try:
        limits = disk_limits(arguments.model, scratch)
        results: list[dict[str, Any]] = []
        for scheme in schemes:
            results.append(measure(arguments.model, scheme, arguments.workers, scratch, arguments.warm))
            print(f"{scheme}: {results[-1]['mb_per_s']:.0f} MB/s, {results[-1]['peak_mb']:.0f} MB", file=sys.stderr)
    finally:
        shutil.rmtree(scratch)
    write_results(arguments.name, {"disk": limits, "runs": results}, report(results, limits))


if __name__ == "__main__":
    main()
