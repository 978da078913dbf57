"""transformers, with the library that each layout needs (compressed-tensors, bitsandbytes, GPTQModel, gguf)."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.readers.base import Reader, ReaderError

_ERRORS = (RuntimeError, ValueError, ImportError, KeyError, AttributeError, TypeError, NotImplementedError, OSError)


def _logits(path: Path, ids: Tensor) -> Tensor:
    try:
        with quiet(), torch.inference_mode():
            if path.is_file():
                model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
            else:
                config = load_config(resolve_model(path), drop_quantization=True)
                model = _class_of(config).from_pretrained(path)
            result = model.eval()(input_ids=ids.to(model.device))
    except _ERRORS as error:
        raise ReaderError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    found = getattr(result, "logits", None)
    return (result.last_hidden_state if found is None else found).float().cpu()


def _class_of(config: Any) -> Any:
    return type(build_skeleton(config))


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Libraries print progress bars and reports while they load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


LAYOUTS = ("compressed-tensors", "bnb-nf4", "bnb-fp4", "bnb-int8", "gptq", "gptq-v2", "awq", "gguf", "torchao")
READER = Reader("transformers", "transformers", "transformers", LAYOUTS, _logits)
