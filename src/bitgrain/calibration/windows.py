"""Calibration text as windows of tokens, and what the manifest says of them.

Documents are tokenized whole and packed one behind the other; the stream is cut in windows that do not overlap. One
running text, its first windows, special tokens once in front: that is `token_windows`, as figures are published.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitgrain.calibration.sources import Conversation, Document, Source, open_source
from bitgrain.calibration.text import check_ids, token_ids
from bitgrain.errors import TextError

__all__ = ["CalibrationText", "calibration_windows"]

Sampling = Literal["first", "random"]
Separator = Literal["auto", "eos", "none"]
Chat = Literal["template", "join"]

LEAST_SHARE = 4
"""A text that gives fewer than one in so many of the windows asked for is refused."""
POOL = 8
"""Random windows of documents are drawn from so many times the tokens asked for: a dataset need not be read whole."""
_KNOWN_MARK = "<|endoftext|>"


@dataclass(frozen=True)
class CalibrationText:
    """Token ids int64 [windows, seqlen], and their description for the manifest (JSON values, no paths)."""

    ids: Tensor
    description: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """What the user should be told."""
        return self.description["notes"]


def calibration_windows(
    text_source: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None = 128,
    seqlen: int = 512,
    sampling: Sampling = "first",
    seed: int = 0,
    vocab_size: int | None = None,
    special_tokens: bool = True,
    separator: Separator = "auto",
    document_mark: str | None = None,
    chat: Chat = "template",
) -> CalibrationText:
    """`windows` windows of `seqlen` tokens from one source or several (`open_source`), one behind the other; None: all.

    sampling        "first": the first windows; "random": documents in an order that `seed` gives, and among the first
                    `POOL` times as many windows those that `seed` draws (one running text: among all its windows)
    vocab_size      the model's: every id must be below it
    special_tokens  what the tokenizer puts around a text, around each document
    separator       between documents: "eos" the tokenizer's end token (if it has one), "none", or "auto": eos, unless
                    special tokens or a chat template mark the documents already
    document_mark   see `open_source`
    chat            conversations: "template" (the tokenizer's chat template) or "join" (their contents by empty lines)

    A text that is too short gives fewer windows and a note, down to a quarter of those asked; below that, TextError.
    Raises TextError also for unreadable sources, ids that the model does not have, chats without a chat template.
    """
    if (windows is not None and windows < 1) or seqlen < 1:
        raise TextError(f"{windows} calibration windows of {seqlen} tokens: both must be at least 1")
    if sampling not in ("first", "random"):
        raise TextError(f"unknown sampling {sampling!r} of calibration text: use 'first' or 'random'")
    named = [text_source] if isinstance(text_source, (str, Path)) else list(text_source)
    sources = [open_source(one, document_mark=document_mark) for one in named]
    if not sources:
        raise TextError("no calibration text is given: name a file, or builtin")
    parted = len(sources) > 1 or sources[0].parted
    wanted = None if windows is None else windows * seqlen
    generator = torch.Generator().manual_seed(seed)
    packer = _Packer(tokenizer, special_tokens, separator if parted else "none", chat)
    if sampling == "first":
        ids = packer.pack(_documents(sources, None), wanted)
    else:
        ids = packer.pack(_documents(sources, generator), POOL * wanted if parted and wanted is not None else None)
    found = len(ids) // seqlen
    got = found if windows is None else min(found, windows)
    if windows is None and not found:
        raise TextError(f"the text has {len(ids)} tokens and one window needs {seqlen}: give a longer text")
    notes = [] if windows is None else _shortfall(got, windows, seqlen, len(ids))
    notes += _unknown_mark(sources, tokenizer, document_mark)
    rows = torch.tensor(ids[: found * seqlen], dtype=torch.int64).view(found, seqlen)
    rows = rows[:got] if sampling == "first" else rows[torch.randperm(found, generator=generator)[:got]]
    check_ids(rows, vocab_size)
    description = {
        "sources": [source.name for source in sources],
        "documents": packer.documents,
        "sha256": hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest(),
        "tokens": got * seqlen,
        "seqlen": seqlen,
        "windows_asked": windows,
        "windows": got,
        "sampling": sampling,
        "seed": seed if sampling == "random" else None,
        "special_tokens": special_tokens,
        "separator": packer.separator_text,
        "document_mark": document_mark,
        "chat": chat if packer.conversations else None,
        "notes": notes,
    }
    return CalibrationText(rows, description)


def _documents(sources: Sequence[Source], generator: torch.Generator | None) -> Iterator[Document]:
    """All documents in order, or in a random one; empty ones are left out."""
    places = [(source, i) for source in sources for i in range(len(source.documents))]
    order = range(len(places)) if generator is None else torch.randperm(len(places), generator=generator).tolist()
    for place in order:
        source, i = places[place]
        document = source.documents[i]
        if document:
            yield document


class _Packer:
    """Tokenizes documents and puts them one behind the other."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens: bool, separator: Separator, chat: Chat
    ) -> None:
        if separator not in ("auto", "eos", "none") or chat not in ("template", "join"):
            raise TextError(f"separator {separator!r}, chat {chat!r}: use auto, eos or none; template or join")
        self._tokenizer, self._special, self._separator, self._chat = tokenizer, special_tokens, separator, chat
        self._marked = special_tokens and tokenizer.num_special_tokens_to_add() > 0
        eos: Any = tokenizer.eos_token_id
        self._eos: int | None = eos if isinstance(eos, int) else None
        self.documents = self.conversations = 0
        self.separator_text: str | None = None

    def pack(self, documents: Iterator[Document], count: int | None) -> list[int]:
        """The ids of the documents; `count`: stop once there are so many."""
        ids: list[int] = []
        between: list[int] = []
        for document in documents:
            if count is not None and len(ids) >= count:
                break
            templated = not isinstance(document, str) and self._chat == "template"
            text = document if isinstance(document, str) else self._render(document)
            missing = None if count is None else count - len(ids)
            ids += between
            ids += token_ids(self._tokenizer, text, missing, self._special and not templated)
            self.documents += 1
            between = self._behind(templated or self._marked)
        return ids

    def _behind(self, marked: bool) -> list[int]:
        if self._eos is None or self._separator == "none" or (self._separator == "auto" and marked):
            return []
        self.separator_text = str(self._tokenizer.eos_token)
        return [self._eos]

    def _render(self, messages: Conversation) -> str:
        self.conversations += 1
        if self._chat == "join":
            return "\n\n".join(str(message["content"]) for message in messages)
        if not self._tokenizer.chat_template:
            raise TextError(
                "the calibration text holds chat messages, and this tokenizer has no chat template: "
                "set chat to join to use their contents as plain text, or give plain text"
            )
        try:
            jinja2: Any = importlib.import_module("jinja2")  # transformers imports it as late
        except ImportError as error:
            raise TextError("chat templates need jinja2: pip install jinja2, or set chat to join") from error
        try:
            return str(self._tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TextError(
                f"the chat template refuses a conversation ({error}): mend the record, or set chat to join"
            ) from error


def _shortfall(got: int, windows: int, seqlen: int, tokens: int) -> list[str]:
    """A note if there are fewer windows than asked. Raises TextError for fewer than a quarter."""
    if got == windows:
        return []
    what = f"the calibration text has {tokens} tokens, enough for {got} of the {windows} windows of {seqlen} asked for"
    if got * LEAST_SHARE < windows:
        raise TextError(f"{what}: give a longer text, or ask for fewer or shorter windows")
    return [f"{what}: {got} are used, and the result will be less accurate"]


def _unknown_mark(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, mark: str | None) -> list[str]:
    """A note where plain texts hold <|endoftext|> and the tokenizer would cut that to pieces."""
    if mark is not None or _KNOWN_MARK in tokenizer.get_vocab():
        return []
    return [
        f"{source.name} holds {_KNOWN_MARK}, which this tokenizer does not know: set it as the document mark"
        for source in sources
        if not source.parted and isinstance(text := source.documents[0], str) and _KNOWN_MARK in text
    ]
