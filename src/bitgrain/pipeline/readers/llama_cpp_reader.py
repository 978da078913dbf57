"""llama.cpp, through llama-cpp-python.

Its own kernels round the inputs of quantized layers to 8 bits. Built with BLAS (`-DGGML_BLAS=ON`; Accelerate on macOS),
it widens the weights of any product with 32 tokens or more and multiplies in float32: then logits can be compared as
they are.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.pipeline.readers.base import Reader, ReaderError

_LEAST_BLAS_TOKENS = 32
"""ggml_backend_blas_device_supports_op: fewer go to the other kernels."""


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


def _rounds(tokens: int) -> bool:
    libraries = Path(str(import_module("llama_cpp").__file__)).parent / "lib"
    return tokens < _LEAST_BLAS_TOKENS or not any(libraries.glob("*ggml-blas.*"))


READER = Reader("llama.cpp", "llama-cpp-python", "llama_cpp", ("gguf",), _logits, _rounds)
