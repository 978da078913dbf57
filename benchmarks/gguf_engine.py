"""KL of GGUF files as llama.cpp itself computes it: ours against llama-quantize's, of the same size.

    make bench-gguf-engine ARGS="--model DIR --calibration FILE --text FILE --quantizer llama-quantize"

llama.cpp (llama-cpp-python) runs the model in float32 and each file over the same windows; KL(base || file) in nats a
token. Ours: `bitgrain quantize --layout gguf --bits B --recipe balanced`. Theirs: llama-quantize with an importance
matrix (mean squares of every linear's inputs, over the same windows of the same calibration text), embeddings and
output left in float32, as ours are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

import bitgrain
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.writer import GgufWriter, plan_gguf
from bitgrain.pipeline.readers.registry import get_reader

PAIRS = ((4.70, "Q4_K_M"), (3.85, "Q3_K_M"), (2.93, "Q2_K"))
BAR = 0.6
WINDOWS, LENGTH = 128, 512
_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
_NAMES["mlp.down_proj"] = "ffn_down"


def windows(model: Path, text: Path, count: int) -> torch.Tensor:
    """int64 [count, LENGTH] of the text."""
    found = token_windows(load_tokenizer(model), read_text(text), LENGTH, count)
    return found[:count]


def write_imatrix(model: Path, ids: torch.Tensor, out: Path) -> None:
    """llama-imatrix's file: sums of squares of the inputs of every linear of the blocks."""
    net: Any = bitgrain.load(model, device="cpu", dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            squares = inputs[0].reshape(-1, inputs[0].shape[-1]).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    for name, module in net.named_modules():
        leaf = ".".join(name.split(".")[3:])
        if leaf in _NAMES:
            module.register_forward_pre_hook(watch(f"blk.{name.split('.')[2]}.{_NAMES[leaf]}.weight"))
    with torch.inference_mode():
        for part in ids.split(4):
            net(input_ids=part)
    metadata: dict[str, Any] = {"general.type": "imatrix", "imatrix.datasets": ["calibration"]}
    metadata |= {"imatrix.chunk_count": len(ids), "imatrix.chunk_size": LENGTH}
    tensors: dict[str, torch.Tensor] = {}
    for name, found in sums.items():
        tensors[f"{name}.in_sum2"] = found.float().reshape(1, -1)
        tensors[f"{name}.counts"] = torch.full((1, 1), float(ids.numel()))
    writer = GgufWriter(out, plan_gguf(metadata, [(n, "F32", tuple(t.shape)) for n, t in tensors.items()]))
    for name, tensor in tensors.items():
        writer.write(name, tensor.contiguous().view(torch.uint8).reshape(tensor.shape[0], -1))
    writer.finish()


def bits_of(path: Path) -> float:
    """Stored bits a weight of the blocks' linears."""
    found = [one for name, one in open_gguf(path).tensors.items() if name.split(".")[-2] in _NAMES.values()]
    elements = sum(one.shape[0] * one.shape[1] for one in found)
    return 8 * sum(one.nbytes for one in found) / elements


def kl(base: torch.Tensor, path: Path, ids: torch.Tensor) -> float:
    """Nats a token; `base` are log-probabilities."""
    found = torch.log_softmax(get_reader("llama.cpp").logits(path, ids).double(), -1)
    return float((base.exp() * (base - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--quantizer", default="llama-quantize")
    parser.add_argument("--windows", type=int, default=50, help="of the held-out text")
    parser.add_argument("--only", type=float, action="append", help="bits; repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        bitgrain.convert(args.model, "gguf:f32", scratch / "base.gguf")
        write_imatrix(args.model, windows(args.model, args.calibration, WINDOWS), scratch / "im.gguf")
        ids = windows(args.model, args.text, args.windows)
        base = torch.log_softmax(get_reader("llama.cpp").logits(scratch / "base.gguf", ids).double(), -1)
        for bits, kind in PAIRS:
            if args.only and bits not in args.only:
                continue
            ours, theirs = scratch / f"ours-{bits}.gguf", scratch / f"{kind}.gguf"
            keep = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
            command = [
                args.quantizer,
                "--imatrix",
                scratch / "im.gguf",
                *keep,
                scratch / "base.gguf",
                theirs,
                kind,
                "1",
            ]
            subprocess.run(command, check=True, capture_output=True)
            job = [sys.executable, "-m", "bitgrain", "quantize", args.model, "--layout", "gguf", "--bits", str(bits)]
            job += ["--recipe", "balanced", "--calibration", args.calibration, "-o", ours, "--quiet"]
            subprocess.run(job, check=True)
            row = {"bits": bits, "kind": kind, "ours_bits": bits_of(ours), "theirs_bits": bits_of(theirs)}
            row |= {"ours_kl": kl(base, ours, ids), "theirs_kl": kl(base, theirs, ids)}
            rows.append(row)
            print(row, flush=True)
    header = ["llama-quantize", "its bits", "its KL", "our bits", "our KL", "ours / its", "bar"]
    cells = [
        [
            f"{r['kind']} with imatrix",
            f"{r['theirs_bits']:.3f}",
            f"{r['theirs_kl']:.5f}",
            f"{r['ours_bits']:.3f}",
            f"{r['ours_kl']:.5f}",
            f"{r['ours_kl'] / r['theirs_kl']:.2f}",
            f"{BAR}",
        ]
        for r in rows
    ]
    text = "\n".join(["# GGUF files through llama.cpp", "", f"{machine_line()}. {__doc__.splitlines()[0]}", ""])
    write_results("gguf-engine", {"rows": rows}, text + "\n" + table(header, cells))


if __name__ == "__main__":
    main()
