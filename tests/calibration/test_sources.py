"""Sources of calibration text."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitgrain.calibration.corpus import builtin_text
from bitgrain.calibration.sources import open_source, parse_hub_name
from bitgrain.errors import TextError


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_a_file_is_one_text_and_so_is_a_folder(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\r\ntwo <|endoftext|> three", encoding="utf-8")
    (tmp_path / "b.md").write_text("four", encoding="utf-8")
    file = open_source(tmp_path / "a.txt")
    assert (file.name, list(file.documents), file.parted) == ("a.txt", ["one\ntwo <|endoftext|> three"], False)
    folder = open_source(str(tmp_path))
    assert (folder.name, list(folder.documents)) == (tmp_path.name, ["one\ntwo <|endoftext|> three\n\nfour"])


def test_marks_part_a_text_into_stripped_documents(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text("<|end|>\none\n<|end|>\n \n<|end|>two\n", encoding="utf-8")
    source = open_source(path, document_mark="<|end|>")
    assert (list(source.documents), source.parted) == (["one", "two"], True)
    assert not open_source(path, document_mark="###").parted  # the mark does not occur
    path.write_text("<|end|> <|end|>", encoding="utf-8")
    with pytest.raises(TextError, match=r"stories\.txt holds nothing between its marks '<\|end\|>'"):
        open_source(path, document_mark="<|end|>")


def test_builtin_is_the_corpus_unless_a_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source("builtin")
    assert (source.name, list(source.documents)) == ("builtin", [builtin_text("calibration")])
    monkeypatch.chdir(tmp_path)
    Path("builtin").write_text("mine", encoding="utf-8")
    assert list(open_source("builtin").documents) == ["mine"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSON"])
def test_json_lines(tmp_path: Path, name: str):
    chat = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / name, {"text": "one"}, {"messages": chat, "id": 3}, {"text": " "}, {"text": "two"})
    source = open_source(path)
    assert (source.name, list(source.documents), source.parted) == (name, ["one", tuple(chat), "two"], True)


def test_a_json_list(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1), encoding="utf-8")
    assert list(open_source(path).documents) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ('{"text": "a"}\n\n"b"', "line 3 is no JSON object: give records with a `text`, or with chat `messages`"),
        ('{"prompt": "a", "answer": "b"}', "line 1 has the fields answer, prompt, but neither `text` nor `messages`"),
        ('{"messages": [{"content": "a"}]}', "line 1 has a message without `role` and `content`"),
        ('{"messages": ["a"]}', "a message without `role`"),
        ('[{"text": "a"}, {"text": 3}]', "record 2 has the fields text, but neither"),
        ("", "is empty: give a file with at least one record"),
        ('{"text": ""}', "is empty"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, content: str, words: str):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TextError) as caught:
        open_source(path)
    assert words in str(caught.value)
    assert "a.jsonl" in str(caught.value)


def test_missing_files_are_named(tmp_path: Path):
    for name in ("no.txt", "no.jsonl"):
        with pytest.raises(TextError, match=f"{name} does not exist"):
            open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:org/name:train[:100]", ("org/name", None, "train[:100]")),
        ("hf:org/name:en", ("org/name", "en", "train")),
        ("hf:org/name:en:validation[5%:]", ("org/name", "en", "validation[5%:]")),
        ("hf:name::dump", ("name", None, "dump")),
    ],
)
def test_hub_names(source: str, parts: tuple[str, str | None, str]):
    assert parse_hub_name(source) == parts


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:b:c:d"])
def test_bad_hub_names(source: str):
    with pytest.raises(TextError, match="names no dataset: write hf:NAME"):
        parse_hub_name(source)


class Fake(ModuleType):
    """Stands for the datasets library."""

    def __init__(self, rows: list[Any], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error, self.asked = rows, error, []

    def load_dataset(self, name: str, config: str | None, split: str) -> list[Any]:
        self.asked.append((name, config, split))
        if self.error:
            raise self.error
        return self.rows


def test_datasets_are_read_row_by_row(monkeypatch: pytest.MonkeyPatch):
    fake = Fake([{"text": "one"}, {"messages": [{"role": "user", "content": "hi"}]}, {"x": 1}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = open_source("hf:org/name:en:test")
    assert fake.asked == [("org/name", "en", "test")]
    assert (source.name, len(source.documents), source.parted) == ("hf:org/name:en:test", 3, True)
    assert source.documents[0] == "one"
    assert source.documents[1] == ({"role": "user", "content": "hi"},)
    with pytest.raises(TextError, match="row 2 has the fields x, but neither"):
        source.documents[2]


def test_datasets_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", Fake([], FileNotFoundError("no such dataset\nand a long story")))
    with pytest.raises(TextError, match=r"dataset a, split train, cannot be loaded: no such dataset$"):
        open_source("hf:a")
    monkeypatch.setitem(sys.modules, "datasets", Fake([]))
    with pytest.raises(TextError, match="has no rows"):
        open_source("hf:a")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="needs the datasets library, which is not here: pip install datasets"):
        open_source("hf:a")


def test_a_local_folder_through_the_real_library(tmp_path: Path):
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    source = open_source(f"hf:{tmp_path}")
    assert (source.name, list(source.documents)) == (f"hf:{tmp_path.name}", ["one", "two"])
