"""Calibration windows: the ids, what is recorded, and what is refused."""

import hashlib
import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bitgrain.calibration.sources import open_source
from bitgrain.calibration.text import load_tokenizer, token_windows
from bitgrain.calibration.windows import calibration_windows
from bitgrain.errors import TextError

BOS, EOS = 0, 1


def words(specials: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """Token i + 2 is the word "w<i>"; BOS in front of a text if `specials`."""
    tokenizer = Tokenizer(WordLevel({"<s>": BOS, "</s>": EOS} | {f"w{i}": i + 2 for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def file_of(folder: Path, ids: Sequence[int]) -> Path:
    (folder / "text.txt").write_text(text_of(ids), encoding="utf-8")
    return folder / "text.txt"


def records(folder: Path, *documents: Any) -> Path:
    lines = [{"text": text_of(d)} if isinstance(d, range | list) else d for d in documents]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder / "text.jsonl"


def test_first_windows_of_one_text_are_token_windows(tmp_path: Path):
    path = file_of(tmp_path, range(100))
    found = calibration_windows(path, words(), windows=4, seqlen=16)
    assert torch.equal(found.ids, token_windows(words(), path.read_text(), 16, 4, special_tokens=True))
    assert found.ids[0].tolist() == [BOS, *range(2, 17)]
    assert found.ids.dtype == torch.int64
    plain = calibration_windows(path, words(), windows=4, seqlen=16, special_tokens=False)
    assert plain.ids[0, 0] == 2


def test_the_description_says_it_all(tmp_path: Path):
    found = calibration_windows(file_of(tmp_path, range(100)), words(), windows=3, seqlen=20)
    numbers = [n for row in found.ids.tolist() for n in row]
    assert found.description == {
        "sources": ["text.txt"],
        "documents": 1,
        "sha256": hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest(),
        "tokens": 60,
        "seqlen": 20,
        "windows_asked": 3,
        "windows": 3,
        "sampling": "first",
        "seed": None,
        "special_tokens": True,
        "separator": None,
        "document_mark": None,
        "chat": None,
        "notes": [],
    }
    assert json.loads(json.dumps(found.description)) == found.description
    assert found.notes == []


@pytest.mark.parametrize(
    ("specials", "separator", "expected"),
    [
        (True, "auto", [BOS, 2, 3, BOS, 4, 5, BOS, 6]),  # BOS parts them already
        (True, "eos", [BOS, 2, 3, EOS, BOS, 4, 5, EOS, BOS, 6]),
        (True, "none", [BOS, 2, 3, BOS, 4, 5, BOS, 6]),
        (False, "auto", [2, 3, EOS, 4, 5, EOS, 6]),
        (False, "none", [2, 3, 4, 5, 6]),
    ],
)
def test_documents_are_whole_and_parted(tmp_path: Path, specials: bool, separator: Any, expected: list[int]):
    path = records(tmp_path, [0, 1], [2, 3], {"text": " "}, [4])
    found = calibration_windows(path, words(specials), windows=1, seqlen=len(expected), separator=separator)
    assert found.ids.tolist() == [expected]
    assert found.description["documents"] == 3
    assert found.description["separator"] == ("</s>" if EOS in expected else None)
    without = calibration_windows(path, words(True), windows=1, seqlen=5, separator="auto", special_tokens=False)
    assert without.ids.tolist() == [[2, 3, EOS, 4, 5]]


def test_no_end_token_no_separator(tmp_path: Path):
    tokenizer = words(False)
    tokenizer.eos_token = None
    found = calibration_windows(records(tmp_path, [0], [1]), tokenizer, windows=1, seqlen=2, separator="eos")
    assert (found.ids.tolist(), found.description["separator"]) == ([[2, 3]], None)


def test_several_sources_follow_one_another(tmp_path: Path):
    a, b = file_of(tmp_path, [0, 1]), records(tmp_path, [2], [3])
    found = calibration_windows([a, b], words(False), windows=1, seqlen=6)
    assert found.ids.tolist() == [[2, 3, EOS, 4, EOS, 5]]
    assert found.description["sources"] == ["text.txt", "text.jsonl"]
    with pytest.raises(TextError, match="no calibration text is given"):
        calibration_windows([], words())


def test_marked_stories(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text("w0 w1\n<|endoftext|>\nw2\n<|endoftext|>\n", encoding="utf-8")
    found = calibration_windows(path, words(), windows=1, seqlen=5, document_mark="<|endoftext|>")
    assert (found.ids.tolist(), found.notes) == ([[BOS, 2, 3, BOS, 4]], [])
    unaware = calibration_windows(path, words(), windows=1, seqlen=5)
    assert unaware.notes == [
        "stories.txt holds <|endoftext|>, which this tokenizer does not know: set it as the document mark"
    ]
    knows = words()
    knows.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert calibration_windows(path, knows, windows=1, seqlen=5).notes == []


# --- sampling ----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 2**40), st.integers(1, 5))
def test_random_windows_are_windows_of_the_text_without_repeats(tmp_path_factory: Any, seed: int, windows: int):
    path = file_of(tmp_path_factory.mktemp("text"), range(50))
    every = token_windows(words(), path.read_text(), 8, special_tokens=True).tolist()
    assert len(every) == 6
    found = calibration_windows(path, words(), windows=windows, seqlen=8, sampling="random", seed=seed)
    again = calibration_windows(path, words(), windows=windows, seqlen=8, sampling="random", seed=seed)
    assert torch.equal(found.ids, again.ids)
    rows = [tuple(row) for row in found.ids.tolist()]
    assert len(set(rows)) == windows
    assert all(list(row) in every for row in rows)
    assert found.description["seed"] == seed


def test_seeds_give_different_windows_and_reach_all_of_the_text(tmp_path: Path):
    path = file_of(tmp_path, range(80))
    drawn = [
        calibration_windows(path, words(), windows=2, seqlen=8, sampling="random", seed=seed).ids.tolist()
        for seed in range(20)
    ]
    assert len({str(one) for one in drawn}) > 10
    assert len({str(row) for one in drawn for row in one}) == 10


def test_random_documents_are_read_no_further_than_the_pool(tmp_path: Path):
    documents = [[i] * 4 for i in range(90)]
    path = records(tmp_path, *documents)
    found = calibration_windows(path, words(False), windows=2, seqlen=5, sampling="random", seed=1)
    assert found.description["documents"] <= 17  # 8 x 10 tokens and one more
    for row in found.ids.tolist():
        assert len({token for token in row if token != EOS}) <= 2
    first = calibration_windows(path, words(False), windows=2, seqlen=5)
    assert first.ids.tolist() == [[2, 2, 2, 2, EOS], [3, 3, 3, 3, EOS]]
    assert first.description["documents"] == 3


# --- chats -------------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"


def test_chats_go_through_the_template(tmp_path: Path):
    path = records(tmp_path, CHAT, [7])
    found = calibration_windows(path, words(chat_template=TEMPLATE), windows=1, seqlen=9)
    assert found.ids.tolist() == [[BOS, 3, 4, EOS, BOS, 5, EOS, BOS, 9]]  # and no special tokens around it
    assert found.description["chat"] == "template"


def test_chats_without_a_template(tmp_path: Path):
    path = records(tmp_path, CHAT)
    with pytest.raises(TextError, match="this tokenizer has no chat template: set chat to join"):
        calibration_windows(path, words(), windows=1, seqlen=4)
    found = calibration_windows(path, words(), windows=1, seqlen=4, chat="join")
    assert (found.ids.tolist(), found.description["chat"]) == ([[BOS, 3, 4, 5]], "join")


def test_a_template_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = records(tmp_path, CHAT)
    refusing = words(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TextError, match=r"the chat template refuses a conversation \(roles must alternate\)"):
        calibration_windows(path, refusing, windows=1, seqlen=4)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TextError, match="chat templates need jinja2"):
        calibration_windows(path, refusing, windows=1, seqlen=4)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_short_text_gives_fewer_windows_and_a_note(tmp_path: Path):
    path = file_of(tmp_path, range(31))  # 32 tokens with BOS
    found = calibration_windows(path, words(), windows=16, seqlen=8)
    assert found.ids.shape == (4, 8)
    assert (found.description["windows"], found.description["windows_asked"]) == (4, 16)
    assert found.notes == [
        "the calibration text has 32 tokens, enough for 4 of the 16 windows of 8 asked for: "
        "4 are used, and the result will be less accurate"
    ]
    with pytest.raises(TextError, match="enough for 4 of the 17 windows of 8 asked for: give a longer text"):
        calibration_windows(path, words(), windows=17, seqlen=8)
    with pytest.raises(TextError, match="enough for 0 of the 1 windows of 33"):
        calibration_windows(path, words(), windows=1, seqlen=33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "0 calibration windows of 8 tokens: both must be at least 1"),
        ({"seqlen": 0}, "must be at least 1"),
        ({"sampling": "last"}, "unknown sampling 'last'"),
        ({"separator": "tab"}, "separator 'tab'"),
        ({"chat": "plain"}, "chat 'plain'"),
        ({"vocab_size": 9}, "gives token id 9 and the model has 9 ids"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], message: str):
    path = records(tmp_path, range(20), range(5))
    with pytest.raises(TextError, match=message):
        calibration_windows(path, words(False), **({"windows": 1, "seqlen": 8} | settings))


def test_the_harness_windows_of_the_reference_models(shared: Path):
    """As the peers were calibrated: stories one by one, each with the tokenizer's special tokens, nothing between."""
    stories = shared / "text" / "tinystories.txt"
    tokenizer = load_tokenizer(shared / "models" / "tinystories-656k")
    found = calibration_windows(stories, tokenizer, windows=8, document_mark="<|endoftext|>")
    documents = open_source(stories, document_mark="<|endoftext|>").documents[:60]
    ids = [i for document in documents for i in tokenizer.backend_tokenizer.encode(document).ids]
    assert found.ids.flatten().tolist() == ids[: 8 * 512]


def test_all_windows_of_a_text_that_holds_none(tmp_path: Path):
    with pytest.raises(TextError, match="the text has 7 tokens and one window needs 8: give a longer text"):
        calibration_windows(file_of(tmp_path, range(7)), words(specials=False), windows=None, seqlen=8)
