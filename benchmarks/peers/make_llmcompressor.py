"""llm-compressor: `oneshot`, saved compressed; loaded by transformers with compressed-tensors.

FP4 is decompressed while loading, to float32: to bfloat16, as it would be otherwise, weights are rounded.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import compressed_tensors.compressors.nvfp4.base as nvfp4
import torch
from answer import Logits, calibration, serve
from datasets import Dataset
from in_transformers import run
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

# It pins memory for a GPU, whether there is one or not.
IntermediatesCache.pin_memory = lambda *_, **__: None
nvfp4.unpack_fp4_from_uint8 = partial(nvfp4.unpack_fp4_from_uint8, dtype=torch.float32)


def make(request: dict[str, Any]) -> Path:
    out, settings = Path(request["out"]), dict(request["settings"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    modifier = GPTQModifier if settings.pop("gptq", False) else QuantizationModifier
    shown = settings.pop("calibrated", modifier is GPTQModifier)
    more: dict[str, Any] = {}
    if shown:
        ids = calibration(request)
        rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
        more = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(ids)}
        more |= {"max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
    oneshot(model=model, recipe=[modifier(targets="Linear", ignore=["lm_head"], **settings)], **more)
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(out)
    return out


def load(path: Path) -> Logits:
    fp4 = "fp4-pack-quantized" in (path / "config.json").read_text(encoding="utf-8")
    config = CompressedTensorsConfig(dequantize=fp4)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    return run(model)


serve(("llmcompressor", "compressed-tensors", "transformers"), make, load)
