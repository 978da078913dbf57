import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from bitgrain.calibration import text as text_module
from bitgrain.calibration.text import load_tokenizer, read_text, token_windows
from bitgrain.errors import TextError

PROSE = "The quick brown fox didn't jump over 1234 lazy dogs;\n\nbut THEY'RE   not  amused! Ça va, naïve café?\n " * 20


def byte_level(split: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A small byte-level BPE; `split` None is GPT-2's own regular expression."""
    tokenizer = Tokenizer(BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def fast(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def word_tokenizer(count: int = 10) -> PreTrainedTokenizerFast:
    """Token i is the word "w<i>"."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(tokenizer)


# --- reading -----------------------------------------------------------------------------------------------------


def test_file_is_read_as_utf8_with_plain_line_ends(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("é\r\nb\rc\n".encode())
    assert read_text(file) == "é\nb\nc\n"
    assert read_text(str(file)) == "é\nb\nc\n"


def test_folder_is_read_in_the_order_of_names(tmp_path: Path):
    for name in ("b.md", "a.txt", "c.TXT", "skipped.json"):
        (tmp_path / name).write_text(name)
    assert read_text(tmp_path) == "a.txt\n\nb.md\n\nc.TXT"


def test_bad_encoding_names_file_and_offset(tmp_path: Path):
    file = tmp_path / "latin.txt"
    file.write_bytes("abc é".encode("latin1"))
    with pytest.raises(TextError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 4"):
        read_text(file)
    with pytest.raises(TextError, match=r"latin\.txt is not UTF-8"):
        read_text(tmp_path)


def test_missing_and_empty(tmp_path: Path):
    with pytest.raises(TextError, match=r"none\.txt does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(TextError, match=r"holds no \.txt or \.md file"):
        read_text(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(TextError, match=r"blank\.txt is empty"):
        read_text(tmp_path / "blank.txt")
    with pytest.raises(TextError, match="is empty"):
        read_text(tmp_path)


# --- loading -----------------------------------------------------------------------------------------------------


def test_tokenizer_json_alone_is_enough(tmp_path: Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (
        tokenizer("the fox", add_special_tokens=False)["input_ids"]
        == byte_level().encode("the fox", add_special_tokens=False).ids
    )


def test_tokenizer_json_is_taken_as_it_stands(tmp_path: Path):
    """A class named in tokenizer_config.json must not replace the pipeline of the file."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_token == "<s>"
    assert tokenizer(PROSE)["input_ids"] == byte_level().encode(PROSE).ids


def test_missing_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TextError, match=r"tokenizer missing: .* copy it from the original model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TextError, match="tokenizer missing"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ['{"bad', "[]", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "\xff"])
@pytest.mark.parametrize("config", [None, "{}"])
def test_corrupt_tokenizer_json(tmp_path: Path, content: str, config: str | None):
    (tmp_path / "tokenizer.json").write_text(content, "latin1")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(TextError, match=r"corrupt|cannot be loaded"):
        load_tokenizer(tmp_path)


def test_corrupt_tokenizer_config(tmp_path: Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(TextError, match=r"tokenizer_config\.json is corrupt"):
        load_tokenizer(tmp_path)


def test_custom_code_runs_only_when_trusted(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the model was run')")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TextError, match="trust_remote_code"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-outliers", "stories260k", "tinystories-656k"])
def test_reference_tokenizers_give_the_ids_of_their_file(shared: Path, name: str):
    text = read_text(shared / "text" / "heldout.txt")[:30_000]
    tokenizer = load_tokenizer(shared / "models" / name)
    raw = Tokenizer.from_file(str(shared / "models" / name / "tokenizer.json"))
    for special in (False, True):
        windows = token_windows(tokenizer, text, 64, special_tokens=special)
        ids = raw.encode(text, add_special_tokens=special).ids
        assert windows.flatten().tolist() == ids[: len(ids) // 64 * 64]


# --- windows -----------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    words = " ".join(f"w{i % 10}" for i in range(23))
    windows = token_windows(word_tokenizer(), words, 5)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert torch.equal(token_windows(word_tokenizer(), words, 5, 3), windows[:3])
    assert torch.equal(token_windows(word_tokenizer(), words, 5, 99), windows)


def test_special_tokens_stand_around_the_whole_text_not_each_window():
    tokenizer = fast(byte_level())
    plain = token_windows(tokenizer, PROSE, 8).flatten()
    special = token_windows(tokenizer, PROSE, 8, special_tokens=True).flatten()
    assert special[0] == 0
    assert (plain > 1).all()
    assert (special[1:] > 1).all()
    assert torch.equal(special[1 : len(plain)], plain[: len(plain) - 1])


def test_too_short_says_how_much_there_is():
    with pytest.raises(TextError, match="the text has 3 tokens and one window needs 5"):
        token_windows(word_tokenizer(), "w1 w2 w3", 5)
    with pytest.raises(TextError, match="at least 1"):
        token_windows(word_tokenizer(), "w1 w2 w3", 2, 0)
    with pytest.raises(TextError, match="at least 1"):
        token_windows(word_tokenizer(), "w1 w2 w3", 0)


def test_ids_must_be_the_models():
    with pytest.raises(TextError, match="gives token id 7 and the model has 7 ids"):
        token_windows(word_tokenizer(), "w1 w7", 2, vocab_size=7)
    assert token_windows(word_tokenizer(), "w1 w7", 2, vocab_size=8).tolist() == [[1, 7]]


def test_no_warning_and_no_cut_at_the_models_length(caplog: pytest.LogCaptureFixture):
    backend = byte_level()
    backend.enable_truncation(16)
    backend.enable_padding(length=4096)
    tokenizer = fast(backend, model_max_length=16)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        try:
            windows = token_windows(tokenizer, PROSE, 8)
        finally:
            logging.getLogger("transformers").propagate = False
    assert caplog.records == []
    assert windows.flatten().tolist() == byte_level().encode(PROSE, add_special_tokens=False).ids[: windows.numel()]


# --- the first windows of a huge text -------------------------------------------------------------------------------

LOCAL = {
    "gpt2": fast(byte_level()),
    "llama3": fast(byte_level(text_module.LLAMA3_SPLIT)),
    "qwen2": fast(byte_level(text_module.QWEN2_SPLIT, normalizers.NFC())),
}
PIECES = ["a", "Z", "é", "e\u0301", "\u0301", "'", "'s", "'re", "'RE", "7", "123", " ", "  ", "\n", "\r", "\t"]
PIECES += ["\u00a0", "!", "...", "<s>", "中", "the fox", " a\n", "x y"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=120).map("".join), st.integers(1, 4), st.booleans())
def test_leading_windows_equal_those_of_the_whole_text(text: str, seqlen: int, special: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CUT_SEARCH", 6)
        for tokenizer in LOCAL.values():
            whole = text_module._all_ids(tokenizer, text, special)
            for windows in (1, 3):
                if windows * seqlen > len(whole):
                    continue
                found = text_module._leading_ids(tokenizer, text, windows * seqlen, special)
                if found is not None:
                    assert found[: windows * seqlen] == whole[: windows * seqlen]


@pytest.mark.parametrize("name", LOCAL)
def test_huge_text_is_not_tokenized_beyond_need(name: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    original = text_module._all_ids

    def spy(tokenizer: PreTrainedTokenizerFast, text: str, special: bool) -> list[int]:
        asked.append(len(text))
        return original(tokenizer, text, special)

    monkeypatch.setattr(text_module, "_all_ids", spy)
    huge = PROSE * 100
    windows = token_windows(LOCAL[name], huge, 32, 10, special_tokens=True)
    assert sum(asked) < len(huge) // 10
    assert torch.equal(windows, token_windows(LOCAL[name], huge, 32, special_tokens=True)[:10])


def test_pipelines_without_a_proof_are_tokenized_as_a_whole():
    spanning = fast(byte_level())
    spanning.add_tokens([AddedToken("the end")])
    prefixed = byte_level()
    prefixed.normalizer = normalizers.Prepend("_")
    unknown = fast(byte_level(r"\w+ \w+|."))
    unsplit = byte_level()
    unsplit.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    random = byte_level()
    random.model.dropout = 0.1

    class Own(PreTrainedTokenizerFast):
        pass

    others = [spanning, fast(prefixed), unknown, fast(unsplit), fast(random), word_tokenizer()]
    assert not any(text_module._splits_locally(tokenizer) for tokenizer in others)
    assert not text_module._splits_locally(Own(tokenizer_object=byte_level()))
    assert all(text_module._splits_locally(tokenizer) for tokenizer in LOCAL.values())


def test_reference_text_first_windows(shared: Path, tmp_path: Path):
    text = read_text(shared / "text" / "calibration.txt")
    tokenizer = load_tokenizer(shutil.copytree(shared / "models" / "llama", tmp_path / "m"))
    whole = token_windows(tokenizer, text, 512, vocab_size=4096)
    for count in (1, 8, 128):
        assert torch.equal(token_windows(tokenizer, text, 512, count), whole[:count])
