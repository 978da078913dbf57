"""GPTQModel: GPTQ and AWQ, loaded with its plain torch kernels, which take float16 and are put to float32 then."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # a kernel that it would compile
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from pathlib import Path
from typing import Any

import torch
from answer import Logits, calibration, serve
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from in_transformers import run


def make(request: dict[str, Any]) -> Path:
    settings = request["settings"]
    model = GPTQModel.load(request["model"], QuantizeConfig(**settings), device="cpu")
    ids = calibration(request)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()], batch_size=4)
    model.save(request["out"])
    return Path(request["out"])


def load(path: Path) -> Logits:
    awq = '"gemm"' in (path / "config.json").read_text(encoding="utf-8")
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    return run(GPTQModel.load(str(path), device="cpu", dtype=torch.float16, backend=backend).model.float())


serve(("gptqmodel", "transformers"), make, load)
