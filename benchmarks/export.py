"""How fast a quantized model of 1.1 billion parameters is written in each layout, and how much memory that takes.

    make bench-export
    make bench-export ARGS="--only gguf --only gptq"

The model is random; W4A16 in groups of 128 (bfloat16 scales) goes into every layout that holds it, NF4 and int8 into
those of bitsandbytes. Every conversion runs in a process of its own: MB/s counts the bytes written over the wall time
of the whole `convert` (reading, comparing, packing, hashing, fsync); the peak is the process's largest resident set,
less what it held after `import torch, transformers`. The disk's own speed, measured in the same minutes, stands beside.
ONNX is shown with and without the time that tracing the model takes.
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
from memory import disk_limits

MODEL = ROOT / "build" / "random-llama-1.1b"
SOURCES = {
    **dict.fromkeys(("bitgrain", "gptq", "gptq-v2", "awq", "mlx", "gguf", "onnx-qdq", "onnx-nbits"), "W4A16"),
    "compressed-tensors": "W4A16",
    "bnb-nf4": "NF4_BNB",
    "bnb-fp4": "FP4_BNB",
    "bnb-int8": "LLM_INT8",
}
SPEED_BAR_MB_S, PEAK_BAR_MB = 200, 1000
MB = 1e6


def convert_here(source: Path, to: str, out: Path) -> dict[str, Any]:
    """Convert in this process, which has done nothing else before."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    baseline = resident_bytes("VmRSS")
    import bitgrain
    from bitgrain.progress import make_progress

    began = time.perf_counter()
    result = bitgrain.convert(source, to, out, progress=make_progress("quiet"))
    wall = time.perf_counter() - began
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "layout": to,
        "wall_s": wall,
        "tracing_s": result.tracing_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "written_bytes": written,
        "layers": len(result.layers),
        "peak_mb": (resident_bytes("VmHWM") - baseline) / MB,
    }


def measure(source: Path, to: str, scratch: Path) -> dict[str, Any]:
    """`convert_here` in a fresh process."""
    out = scratch / (f"{to}.gguf" if to == "gguf" else to)
    command = [sys.executable, __file__, "--child", to, "--source", str(source), "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"layout": to, "error": True}
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return {**json.loads(done.stdout.splitlines()[-1]), "source": source.name}


def report(results: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """The Markdown page."""
    rows: list[list[str]] = []
    for r in results:
        if r.get("error"):
            rows.append([r["layout"], *["failed"] * 6])
            continue
        writing = r["wall_s"] - r["tracing_s"]
        rows.append(
            [
                r["layout"],
                r["source"],
                f"{r['written_bytes'] / MB:.0f}",
                f"{r['wall_s']:.1f}" + (f" (tracing {r['tracing_s']:.1f})" if r["tracing_s"] else ""),
                f"{r['written_bytes'] / MB / writing:.0f}",
                f"{r['cpu_s']:.1f}",
                f"{r['peak_mb']:.0f}",
            ]
        )
    header = ["layout", "from", "written MB", "wall s", "MB/s", "CPU s", "peak MB"]
    return "\n".join(
        [
            "# Export",
            "",
            f"{machine_line()}. Disk in the same minutes: reads {limits['read_mb_per_s']:.0f} MB/s, writes "
            f"{limits['write_mb_per_s']:.0f} MB/s with fsync. MB/s without tracing; the aim is {SPEED_BAR_MB_S} MB/s "
            f"under {PEAK_BAR_MB} MB.",
            "",
            table(header, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the random model; made if it is not there")
    parser.add_argument("--only", action="append", help="a layout; repeatable")
    parser.add_argument("--scratch", type=Path, help="where results go while they are measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(convert_here(args.source, args.child, args.out)))
        return
    model = random_llama(args.model)
    wanted = args.only or list(SOURCES)
    with tempfile.TemporaryDirectory(dir=args.scratch or model.parent) as name:
        scratch, results = Path(name), list[dict[str, Any]]()
        limits = disk_limits(model, scratch)
        for scheme in dict.fromkeys(SOURCES[to] for to in wanted):
            source = scratch / scheme
            command = [sys.executable, "-m", "bitgrain", "quantize", str(model), "--scheme", scheme, "-o", str(source)]
            subprocess.run([*command, "--quiet", *_layout(scheme)], check=True)
            for to in wanted:
                if SOURCES[to] == scheme:
                    results.append(measure(source, to, scratch))
                    print(json.dumps(results[-1]), flush=True)
            shutil.rmtree(source)
    write_results("export", {"limits": limits, "results": results}, report(results, limits))


def _layout(scheme: str) -> list[str]:
    """bitsandbytes' own scheme is exact in its own layout; it is converted from there to itself."""
    layouts = {"NF4_BNB": "bnb-nf4", "FP4_BNB": "bnb-fp4", "LLM_INT8": "bnb-int8"}
    return ["--layout", layouts[scheme]] if scheme in layouts else []


if __name__ == "__main__":
    main()
