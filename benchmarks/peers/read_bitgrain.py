"""bitgrain, which reads the files that other programs made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from answer import Logits, serve
from in_transformers import run

import bitgrain
from bitgrain.pipeline.contents import read_contents


def make(request: dict[str, Any]) -> Path:
    raise SystemExit(f"{request['answer']}: no path to read")


def load(path: Path) -> Logits:
    """And note what it is: layout, quantized tensors."""
    contents = read_contents(path)
    answer = Path(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["answer"])
    told = json.loads(answer.read_text(encoding="utf-8"))
    told |= {"layout": contents.layout, "layers": sum(tensor.quantized for tensor in contents.tensors)}
    told["weights"] = sorted({tensor.weight for tensor in contents.tensors if tensor.quantized})
    answer.write_text(json.dumps(told), encoding="utf-8")
    # llm-compressor's files are run by transformers with compressed-tensors, which rounds inputs in its own way
    rounding = "transformers" if contents.layout == "compressed-tensors" else "vllm"
    return run(bitgrain.load(path, device="cpu", dtype=torch.float32, execution="dequantize", rounding=rounding))


serve(("bitgrain", "torch"), make, load)
