"""Where calibration text comes from: a file, a folder, JSON records, the built-in corpus, or a Hugging Face dataset.

| source            | what it gives |
|---|---|
| file, folder      | one text, as `read_text` reads it; documents where a mark such as <|endoftext|> parts them |
| *.jsonl, *.json   | one document a record: its `text`, or its chat `messages` |
| builtin           | one text: the calibration part of Python's standard library |
| hf:NAME[:CONFIG][:SPLIT] | one document a row, as for JSON; needs the `datasets` library |
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitgrain.calibration.corpus import builtin_text
from bitgrain.calibration.text import read_file, read_text
from bitgrain.errors import TextError

__all__ = ["Conversation", "Document", "Source", "open_source"]

BUILTIN = "builtin"
HUB = "hf:"
JSON_SUFFIXES = {".json", ".jsonl"}

Conversation = tuple[Mapping[str, Any], ...]
"""Messages of a chat, each with `role` and `content`."""
Document = str | Conversation


@dataclass(frozen=True)
class Source:
    """Text to calibrate with.

    name       for the manifest: no path, so that the same text has the same name on every machine
    documents  in order; those of a dataset are read one by one
    parted     whether they are documents of their own; False: one running text
    """

    name: str
    documents: Sequence[Document]
    parted: bool


def open_source(source: str | Path, *, document_mark: str | None = None) -> Source:
    """What `source` names; see the table above. A path wins over a word that means something else.

    document_mark  what stands between the documents of a plain text, for instance "<|endoftext|>"; None: one text
    Raises TextError: missing, unreadable or empty text, a record without text, `datasets` not installed.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return _hub(source)
    path = Path(source)
    if str(source) == BUILTIN and not path.exists():
        return _plain(BUILTIN, builtin_text("calibration"), document_mark)
    if path.suffix.lower() in JSON_SUFFIXES and not path.is_dir():
        return Source(path.name, _records(path), True)
    return _plain(path.resolve().name, read_text(path), document_mark)


def _plain(name: str, text: str, mark: str | None) -> Source:
    if not mark:
        return Source(name, (text,), False)
    pieces = [piece.strip() for piece in text.split(mark)]
    documents = [piece for piece in pieces if piece]
    if not documents:
        raise TextError(f"text {name} holds nothing between its marks {mark!r}: give a file with text")
    return Source(name, documents, len(documents) > 1)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _records(path: Path) -> list[Document]:
    """The documents of a file of JSON lines, or of one JSON list."""
    text = read_file(path)
    if text.lstrip().startswith("["):
        values = _parse(text, str(path))
        if not isinstance(values, list):
            raise TextError(f"{path} is no list of records: give one JSON object a line, or a list of them")
        numbered = [(f"{path}, record {i}", value) for i, value in enumerate(cast(list[Any], values), 1)]
    else:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        numbered = [(where, _parse(line, where)) for where, line in lines]
    documents = [_document(value, where) for where, value in numbered]
    kept = [document for document in documents if document]
    if not kept:
        raise TextError(f"text {path} is empty: give a file with at least one record that has text")
    return kept


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TextError(f"{where} is no JSON ({error}): give one JSON object a line, or a list of them") from error


def _document(record: Any, where: str) -> Document:
    """The text or the messages of one record; empty ones are left out by the caller."""
    if not isinstance(record, Mapping):
        raise TextError(f"{where} is no JSON object: give records with a `text`, or with chat `messages`")
    fields = cast(Mapping[str, Any], record)
    messages = fields.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        return tuple(_messages(cast(Sequence[Any], messages), where))
    text = fields.get("text")
    if not isinstance(text, str):
        raise TextError(f"{where} has the fields {', '.join(sorted(fields))}, but neither `text` nor `messages`")
    return "" if text.isspace() else text


def _messages(messages: Sequence[Any], where: str) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(cast(Mapping[str, Any], message)):
            raise TextError(f"{where} has a message without `role` and `content`: write every message with both")
        yield cast(Mapping[str, Any], message)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------

_SPLIT = re.compile(r"(train|validation|valid|dev|test)\b")


class _Rows(Sequence[Document]):
    """The rows of a dataset, each read when it is asked for."""

    def __init__(self, name: str, rows: Any) -> None:
        self._name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return _document(self._rows[index], f"{self._name}, row {index}")


def parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """(name, config, split) of "hf:NAME[:CONFIG][:SPLIT]"; a lone part that begins like a split is one.

    Colons inside brackets belong to the split: "hf:NAME:train[:1000]". The split is "train" unless given.
    Raises TextError where the name is empty or there are more parts.
    """
    name, *parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))
    if not name or len(parts) > 2:
        raise TextError(f"{source!r} names no dataset: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    if len(parts) == 1:
        parts = ["", parts[0]] if _SPLIT.match(parts[0]) else [parts[0], ""]
    config, split = parts or ("", "")
    return name, config or None, split or "train"


def _hub(source: str) -> Source:
    name, config, split = parse_hub_name(source)
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise TextError(
            f"{source} needs the datasets library, which is not here: pip install datasets, or name a text file"
        ) from error
    try:
        rows = library.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextError(f"dataset {name}, split {split}, cannot be loaded: {reason}") from error
    if len(rows) == 0:
        raise TextError(f"dataset {name}, split {split}, has no rows: name another split")
    return Source(source if not Path(name).exists() else HUB + Path(name).resolve().name, _Rows(source, rows), True)
