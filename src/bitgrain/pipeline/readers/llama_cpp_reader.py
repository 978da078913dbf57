"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.pipeline.readers.base import Reader, ReaderError


def _logits(path: Path, ids: Tensor) -> Tensor:
    library: Any = import_module("llama_cpp")
    low, defaults = library.llama_cpp, library.llama_cpp.llama_model_default_params

    def plain() -> Any:
        """Without weights repacked for AMX, whose kernels die on virtual machines that announce it and lack it."""
        found = defaults()
        found.use_extra_bufts = False
        return found

    try:
        low.llama_model_default_params = plain
        model = library.Llama(
            str(path), n_ctx=ids.shape[1] + 8, n_batch=ids.shape[1], logits_all=True, n_gpu_layers=0, verbose=False
        )
        found: list[Tensor] = []
        for text in ids.tolist():
            model.reset()
            model.eval(text)
            found.append(torch.from_numpy(model.scores[: len(text)].copy()))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ReaderError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    finally:
        low.llama_model_default_params = defaults
    return torch.stack(found).float()


READER = Reader("llama.cpp", "llama-cpp-python", "llama_cpp", ("gguf",), _logits, exact=False)
