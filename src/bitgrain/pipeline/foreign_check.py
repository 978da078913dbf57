"""Logits of a written checkpoint by an engine's own reader, beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.models.skeleton import load_config
from bitgrain.models.source import resolve_model
from bitgrain.pipeline.checks import Check
from bitgrain.pipeline.load import load
from bitgrain.pipeline.readers.base import Reader, ReaderError
from bitgrain.pipeline.readers.compare import Apart

TOKENS = 128


def check_logits(path: Path, layout: str, reader: Reader, ours: Path, trust_remote_code: bool = False) -> Check:
    """Two random texts through `reader` from `path`, a folder or file in `layout`, and through bitgrain from `ours`.

    ours  is `path` itself; for ONNX, whose graphs bitgrain does not run, the checkpoint that it was made of
    """
    name = f"logits, {reader.name}"
    if layout not in reader.layouts:
        return Check(name, None, f"{reader.name} does not read {layout}, but {', '.join(reader.layouts)}")
    if (missing := reader.missing()) is not None:
        return Check(name, None, missing)
    config = load_config(resolve_model(ours, gguf=True), trust_remote_code, drop_quantization=True)
    ids = random_ids(config)
    if ids is None:
        return Check(name, None, "a model that reads no tokens is not run")
    try:
        theirs = reader.logits(path, ids)
    except ReaderError as error:
        return Check(name, False, f"{reader.title} does not load it: {error}")
    model = load(ours, device="cpu", kv_cache="none", execution="dequantize", trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        result = model(input_ids=ids)
    apart = Apart.of(getattr(result, "logits", result[0]).float(), theirs)
    rounds = reader.rounds(ids.shape[1])
    note = "; it rounds inputs to 8 bits" if rounds else ""
    return Check(name, apart.equal(rounds), f"{reader.title}: {apart} on {ids.numel()} random tokens{note}")


def random_ids(config: Any) -> Tensor | None:
    """int64 [2, tokens], the same every time; None for a model that reads none."""
    text = config.get_text_config()
    if getattr(text, "vocab_size", None) is None:
        return None
    length = min(TOKENS, int(getattr(text, "max_position_embeddings", None) or TOKENS))
    return torch.randint(0, int(text.vocab_size), (2, length), generator=torch.Generator().manual_seed(0))
