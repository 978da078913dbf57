"""tokenizer.json -> the metadata `tokenizer.*` of a GGUF file.

Two of llama.cpp's tokenizers are served: `gpt2` (byte-level BPE) and `llama` (sentencepiece's BPE, with bytes for what
is no piece). sentencepiece joins whichever two neighbours make the piece with the best score; tokenizers joins only
pairs that are listed. Scores are made out of the list, and told where the two are not the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from bitgrain.checkpoints.gguf.pre_tokenizers import find_pre_tokenizer
from bitgrain.errors import PlanError

SPACE = "\u2581"
"""What sentencepiece writes for a blank."""


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of tokens with a meaning, whether the tokenizer puts them around a text, and the template of chats."""

    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None
    padding: int | None = None
    adds_bos: bool = False
    adds_eos: bool = False
    chat_template: str | None = None


@dataclass(frozen=True)
class TokenizerMetadata:
    """What goes into the file, and what the user is told of it."""

    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def tokenizer_metadata(content: Mapping[str, Any], special: SpecialTokens, vocab_size: int) -> TokenizerMetadata:
    """The metadata of a tokenizer with this tokenizer.json, for a model with `vocab_size` ids.

    Raises PlanError for a tokenizer that llama.cpp has no equal of, and for tokens without an embedding.
    """
    model: Mapping[str, Any] = content["model"]
    if model["type"] != "BPE":
        raise PlanError(f"llama.cpp's tokenizers are byte-level or sentencepiece BPE, this one is {model['type']}")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise PlanError(
            "llama.cpp's BPE has no dropout, and no marks inside or at the end of words, as this tokenizer has"
        )
    tokens, types = _tokens(content, vocab_size)
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    notes: tuple[str, ...] = ()
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        found |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        found["tokenizer.ggml.add_space_prefix"] = _adds_space(content)
        pieces = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL]
        scores, other = _scores(merges, pieces)
        found["tokenizer.ggml.scores"] = [scores.get(token, 0.0) for token in tokens]
        types = [TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", one) else kind for one, kind in zip(tokens, types)]
        if other:
            notes = (
                f"the tokenizer lists fewer ways to join pieces than llama.cpp tries ({other} are not listed): some "
                "texts may become other tokens there",
            )
    else:
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(content)}
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    for i in (special.bos, special.eos, special.padding):
        if i is not None and types[i] == TokenType.NORMAL:
            types[i] = TokenType.CONTROL
    if special.unknown is not None and model.get("byte_fallback"):
        types[special.unknown] = TokenType.UNKNOWN
    found["tokenizer.ggml.token_type"] = [int(kind) for kind in types]
    ids = {"bos": special.bos, "eos": special.eos, "unknown": special.unknown, "padding": special.padding}
    found |= {f"tokenizer.ggml.{key}_token_id": one for key, one in ids.items() if one is not None}
    found["tokenizer.ggml.add_bos_token"] = special.adds_bos
    found["tokenizer.ggml.add_eos_token"] = special.adds_eos
    if special.chat_template:
        found["tokenizer.chat_template"] = special.chat_template
    empty = [key for key in ("tokenizer.ggml.merges",) if not found.get(key, True)]
    return TokenizerMetadata({key: value for key, value in found.items() if key not in empty}, notes)


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every id's text and type; ids without a token are unused ones."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    added: Sequence[Mapping[str, Any]] = content.get("added_tokens") or []
    special = {one["content"]: bool(one["special"]) for one in added}
    known: dict[str, int] = {**content["model"]["vocab"], **{one["content"]: one["id"] for one in added}}
    for token, i in known.items():
        if i >= vocab_size:
            raise PlanError(
                f"the token {token!r} has the id {i}, the model only has {vocab_size}: resize its embeddings"
            )
        tokens[i] = token
        types[i] = TokenType.NORMAL
        if token in special:
            types[i] = TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
    return tokens, types


def _pre(content: Mapping[str, Any]) -> str:
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise PlanError(f"llama.cpp's byte-level tokenizer normalizes nothing, this one has {normalizer['type']}")
    found = find_pre_tokenizer(content.get("pre_tokenizer"), bool(content["model"].get("ignore_merges")))
    if found is None:
        raise PlanError(
            "the tokenizer cuts text (pre_tokenizer in tokenizer.json) in a way that has no name in llama.cpp that "
            "bitgrain knows: llama.cpp would give other tokens"
        )
    return found.name


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a blank is put before a text. Raises PlanError for what sentencepiece does not do."""
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepends = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != SPACE:
            raise PlanError(f"llama.cpp's sentencepiece does not normalize by {step['type']}, as this tokenizer does")
    if pre is not None and pre["type"] == "Metaspace" and pre["replacement"] == SPACE:
        return prepends or pre.get("prepend_scheme", "always") != "never"
    if pre is not None and (pre["type"] != "Split" or pre["pattern"] != {"String": " "}):
        raise PlanError(f"llama.cpp's sentencepiece does not cut text by {pre['type']}, as this tokenizer does")
    return prepends


def _scores(merges: Sequence[tuple[str, ...]], pieces: Sequence[str]) -> tuple[dict[str, float], int]:
    """The score of each piece that is joined, and how many ways to join two pieces are not among the merges."""
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores) + 1))
    known, listed = set(pieces), set(merges)
    ways = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    return scores, sum(one[0] in known and one[1] in known and one not in listed for one in ways)
