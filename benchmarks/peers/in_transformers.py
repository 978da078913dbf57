"""Models that transformers loads with the library of their quantizer, in float32 on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from answer import Logits
from transformers import AutoModelForCausalLM


def run(model: Any) -> Logits:
    model.eval()

    def logits(ids: Any) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids)).logits.float().numpy()

    return logits


def load(path: Path) -> Logits:
    return run(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
