"""Tokenizers in GGUF's metadata: what is written reads back as the same tokenizer, what has no equal is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitgrain.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, component_of, find_pre_tokenizer
from bitgrain.checkpoints.gguf.tokenizer import SpecialTokens, TokenType, tokenizer_metadata
from bitgrain.checkpoints.gguf.tokenizer_reader import read_tokenizer
from bitgrain.errors import PlanError, TextError

TEXT = ["The sea was calm; the sky, at 7:45, wasn't. \n\n  Seas, skies: 12345 of them -- été, 海 and \U0001f642!\t"]
SPECIAL = SpecialTokens(bos=0, eos=1, adds_bos=True, chat_template="{{ messages }}")


def byte_level(pre: Any = None) -> dict[str, Any]:
    """tokenizer.json of a trained byte-level tokenizer that begins a text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return json.loads(tokenizer.to_str())


def sentencepiece() -> dict[str, Any]:
    """tokenizer.json of pieces that are joined in every way there is, as sentencepiece does."""
    pieces = ["a", "b", "c", "▁", "ab", "bc", "abc", "▁a", "▁ab", "▁abc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())


def ids(content: dict[str, Any], text: str) -> list[int]:
    return Tokenizer.from_str(json.dumps(content)).encode(text).ids


@pytest.mark.parametrize("one", [one for one in PRE_TOKENIZERS if not one.ignore_merges], ids=lambda one: one.name)
def test_a_byte_level_tokenizer_comes_back(one: PreTokenizer) -> None:
    content = byte_level()
    content["pre_tokenizer"] = component_of(one)
    made = tokenizer_metadata(content, SPECIAL, 310)
    assert made.notes == ()
    assert made.metadata["tokenizer.ggml.pre"] == one.name
    assert made.metadata["tokenizer.ggml.tokens"][-1] == "[PAD309]"
    assert made.metadata["tokenizer.ggml.token_type"][:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert made.metadata["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED
    back, special = read_tokenizer(made.metadata, "file")
    assert special == SPECIAL
    assert ids(back, TEXT[0]) == ids(content, TEXT[0])
    assert ids(back, TEXT[0])[0] == 0


def test_a_sentencepiece_tokenizer_comes_back() -> None:
    content = sentencepiece()
    special = SpecialTokens(bos=1, eos=2, unknown=0)
    made = tokenizer_metadata(content, special, 269)
    assert made.notes == ()
    assert made.metadata["tokenizer.ggml.model"] == "llama"
    assert made.metadata["tokenizer.ggml.add_space_prefix"] is True
    assert made.metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    back, found = read_tokenizer(made.metadata, "file")
    assert found == special
    for text in ("abc abcab  cab", " bca\nab", "a é b"):
        assert ids(back, text) == ids(content, text)


def test_pieces_that_may_be_joined_in_other_ways_are_told() -> None:
    content = sentencepiece()
    content["model"]["merges"].pop()
    (note,) = tokenizer_metadata(content, SpecialTokens(unknown=0), 269).notes
    assert "fewer ways to join pieces" in note


def test_known_ways_of_cutting_are_told_apart() -> None:
    for one in PRE_TOKENIZERS:
        assert find_pre_tokenizer(component_of(one), one.ignore_merges) is one
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    found = tokenizer_metadata(byte_level(digits), SPECIAL, 300).metadata
    assert found["tokenizer.ggml.pre"] == "starcoder"


def test_what_llama_cpp_has_no_equal_of_is_refused() -> None:
    unknown = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]))
    for content, why in (
        (unknown, "has no name in llama.cpp"),
        (byte_level() | {"normalizer": {"type": "Lowercase"}}, "normalizes nothing"),
        (sentencepiece() | {"normalizer": {"type": "NFKC"}}, "does not normalize by NFKC"),
        ({"model": {"type": "WordLevel"}}, "this one is WordLevel"),
    ):
        with pytest.raises(PlanError, match=why):
            tokenizer_metadata(content, SpecialTokens(), 300)
    with pytest.raises(PlanError, match="resize its embeddings"):
        tokenizer_metadata(byte_level(), SpecialTokens(), 100)


def test_damaged_metadata_are_refused() -> None:
    good = dict(tokenizer_metadata(byte_level(), SPECIAL, 300).metadata)
    pieces = dict(tokenizer_metadata(sentencepiece(), SpecialTokens(unknown=0), 269).metadata)
    for metadata, why in (
        ({"tokenizer.ggml.model": "none"}, "holds no tokenizer"),
        (good | {"tokenizer.ggml.model": "bert"}, "the tokenizer 'bert'"),
        (good | {"tokenizer.ggml.tokens": ["a", "a"]}, "are the same"),
        (good | {"tokenizer.ggml.token_type": [1]}, "types of tokens"),
        (good | {"tokenizer.ggml.merges": ["a zzz"]}, "no tokens"),
        (good | {"tokenizer.ggml.merges": ["a"]}, "no tokens"),
        (good | {"tokenizer.ggml.pre": "new"}, "'new', which bitgrain does not know"),
        (good | {"tokenizer.ggml.bos_token_id": 4096}, "bos_token_id is 4096"),
        (pieces | {"tokenizer.ggml.scores": [1.0]}, "no score for each"),
    ):
        with pytest.raises(TextError, match=why):
            read_tokenizer(metadata, "file")
