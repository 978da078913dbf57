"""auto-round: rounding to nearest (no training), in each of its layouts; loaded by transformers with auto-round."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it compiles for minutes what runs for a second

from pathlib import Path
from typing import Any

import torch
from answer import Logits, serve
from auto_round import AutoRound
from in_transformers import run
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer


def make(request: dict[str, Any]) -> Path:
    settings = dict(request["settings"])
    layout = settings.pop("format")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    rounder = AutoRound(
        model, tokenizer, iters=0, disable_opt_rtn=True, enable_torch_compile=False, device_map="cpu", **settings
    )
    rounder.quantize_and_save(request["out"], format=layout)
    (config,) = Path(request["out"]).rglob("config.json")
    return config.parent


def load(path: Path) -> Logits:
    config = AutoRoundConfig(backend="torch")
    return run(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config))


serve(("auto-round", "transformers"), make, load)
