"""The metadata `tokenizer.*` of a GGUF file -> tokenizer.json, and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoints.gguf.pre_tokenizers import NAMES, component_of
from bitgrain.checkpoints.gguf.tokenizer import SPACE, SpecialTokens, TokenType
from bitgrain.errors import TextError


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, Any], SpecialTokens]:
    """tokenizer.json of a file with these metadata. Raises TextError for a tokenizer that bitgrain does not know."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or tokens is None:
        raise TextError(
            f"{where} holds {_none_or(kind)}; bitgrain reads gpt2 and llama. Name the model that has the tokenizer"
        )
    tokens = list(tokens)
    if len(set(tokens)) != len(tokens):
        raise TextError(f"{where}: two of the tokenizer's tokens are the same; name the model that has the tokenizer")
    types = list(metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens)))
    if len(types) != len(tokens):
        raise TextError(f"{where}: {len(tokens)} tokens and {len(types)} types of tokens: the file is damaged")
    special = _special(metadata, len(tokens), kind, where)
    added = [
        {**_PLAIN, "id": i, "content": token, "special": type_ != TokenType.USER_DEFINED}
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    make = _byte_level if kind == "gpt2" else _sentencepiece
    content = make(metadata, tokens, types, vocab, special, where)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _around(tokens, special),
        **content,
    }, special


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _none_or(kind: object) -> str:
    return "no tokenizer" if kind in ("none", "no_vocab") else f"the tokenizer {str(kind)[:40]!r}"


def _special(metadata: Mapping[str, Any], count: int, kind: str, where: str) -> SpecialTokens:
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 2**32 - 1:  # llama.cpp writes -1 where there is none
            continue
        if not isinstance(value, int) or not 0 <= value < count:
            raise TextError(f"{where}: tokenizer.ggml.{name}_token_id is {str(value)[:40]}, of {count} tokens")
        found[name] = value
    template = metadata.get("tokenizer.chat_template")
    return SpecialTokens(
        **found,
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")) and "bos" in found,
        adds_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in found,
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int], special: Any, where: str
) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = NAMES.get(str(name))
    if pre is None:
        raise TextError(
            f"{where}: the tokenizer cuts text as {str(name)[:40]!r}, which bitgrain does not know; "
            "name the model that has it"
        )
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", ())]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys() for pair in merges):
        raise TextError(f"{where}: tokenizer.ggml.merges joins what are no tokens: the file is damaged")
    return {
        "normalizer": None,
        "pre_tokenizer": component_of(pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(vocab, merges, ignore_merges=pre.ignore_merges),
    }


def _sentencepiece(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    vocab: dict[str, int],
    special: SpecialTokens,
    where: str,
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise TextError(f"{where}: its sentencepiece tokenizer has no score for each token: the file is damaged")
    rank = {token: -score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == TokenType.NORMAL}
    pairs = [
        (rank[piece], vocab[piece], i, piece[:i], piece[i:])
        for piece in rank
        for i in range(1, len(piece))
        if piece[:i] in rank and piece[i:] in rank
    ]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, blanks] if prefix else [blanks],
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
        "model": _model(
            vocab,
            [[left, right] for _, _, _, left, right in sorted(pairs)],
            unk_token=None if special.unknown is None else tokens[special.unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _model(vocab: dict[str, int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**plain, **settings, "vocab": vocab, "merges": merges}


def _around(tokens: list[str], special: SpecialTokens) -> dict[str, Any] | None:
    """What is put around a text, as a post-processor."""
    before = [special.bos] if special.adds_bos and special.bos is not None else []
    after = [special.eos] if special.adds_eos and special.eos is not None else []
    if not before + after:
        return None

    def one(sequence: str, kind: int) -> list[dict[str, Any]]:
        marks = [[{"SpecialToken": {"id": tokens[i], "type_id": kind}} for i in ids] for ids in (before, after)]
        return [*marks[0], {"Sequence": {"id": sequence, "type_id": kind}}, *marks[1]]

    known = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in before + after}
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": known,
    }
