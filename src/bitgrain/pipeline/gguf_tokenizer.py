"""The tokenizer of a checkpoint as the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bitgrain.calibration.text import TOKENIZER_FILES, load_tokenizer
from bitgrain.checkpoints.gguf.tokenizer import SpecialTokens, TokenizerMetadata, tokenizer_metadata
from bitgrain.errors import PlanError
from bitgrain.pipeline.stored_gguf import GgufCheckpoint
from bitgrain.pipeline.stored_model import StoredModel


def tokenizer_of(stored: StoredModel, config: Mapping[str, Any], trust_remote_code: bool) -> TokenizerMetadata:
    """What a GGUF file says of the tokenizer beside a model with this config. Raises PlanError, TextError."""
    here = any((stored.path / name).is_file() for name in TOKENIZER_FILES)
    if not (stored.has_tokenizer if isinstance(stored, GgufCheckpoint) else here):
        note = "there is no tokenizer beside the model: llama.cpp can only be given token ids"
        return TokenizerMetadata({"tokenizer.ggml.model": "none"}, (note,))
    tokenizer = load_tokenizer(stored.path, trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(f"{stored.path}: its tokenizer is Python code without a tokenizer.json, which GGUF cannot hold")
    content = json.loads(backend.to_str())
    vocab: Mapping[str, int] = tokenizer.get_vocab()
    bos = _first(tokenizer.bos_token_id, config.get("bos_token_id"))
    eos = _first(tokenizer.eos_token_id, config.get("eos_token_id"))
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    template = tokenizer.chat_template
    special = SpecialTokens(
        bos=bos,
        eos=eos,
        padding=_first(tokenizer.pad_token_id, config.get("pad_token_id")),
        unknown=_first(tokenizer.unk_token_id, vocab.get(content["model"].get("unk_token"))),
        adds_bos=len(whole) > len(bare) and whole[0] == bos,
        adds_eos=len(whole) > len(bare) and whole[-1] == eos,
        chat_template=template if isinstance(template, str) else (template or {}).get("default"),
    )
    return tokenizer_metadata(content, special, config["vocab_size"])


def _first(*found: Any) -> int | None:
    """The first id that there is; of several end tokens, the first."""
    for one in found:
        ids: list[Any] = one if isinstance(one, list) else [one]
        if ids and ids[0] is not None:
            return int(ids[0])
    return None
