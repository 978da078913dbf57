"""GPTQModel, with its plain torch kernel, which is built in float16 (7.7 takes no float32) and run in float32."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.pipeline.readers.base import Reader, ReaderError
from bitgrain.pipeline.readers.transformers_reader import quiet


def _logits(path: Path, ids: Tensor) -> Tensor:
    library: Any = import_module("gptqmodel")
    try:
        with quiet(), torch.inference_mode():
            model = library.GPTQModel.load(str(path), device="cpu", backend=library.BACKEND.TORCH, dtype=torch.float16)
            return model.model.float()(input_ids=ids).logits
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise ReaderError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


READER = Reader("gptqmodel", "gptqmodel", "gptqmodel", ("gptq", "gptq-v2", "awq"), _logits)
