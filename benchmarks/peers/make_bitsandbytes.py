"""bitsandbytes, through transformers, which saves and loads it.

4-bit products run in float32: on processors with bfloat16 products it would round inputs and scales to those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from answer import Logits, serve
from in_transformers import run
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def make(request: dict[str, Any]) -> Path:
    out, settings = Path(request["out"]), dict(request["settings"])
    if settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = torch.float32
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(out)
    return out


def load(path: Path) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return run(model)


serve(("bitsandbytes", "transformers"), make, load)
