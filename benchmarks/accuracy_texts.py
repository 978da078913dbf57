"""What is read: a model, calibration text, evaluation texts, and how a text becomes sequences of tokens.

Running text  the tokenizer's special tokens once in front, windows that do not overlap, the first so many of them.
Documents     parted by a mark, each with special tokens of its own. Calibration packs them in windows; evaluation takes
              the last so many complete ones (the last piece of a file may be cut and is left out), one by one, cut at
              the length of a window.
Both as the harness that measured the other tools has them, so figures compare. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy_methods import digest, file_digest
from common import SHARED

STORY_MARK = "<|endoftext|>"
CALIBRATION_CHARACTERS = 1_500_000
"""Of a file of documents; 24 for each token asked for if that is more."""


@dataclass(frozen=True)
class Job:
    """One model on its texts.

    mark       what stands between documents; None: running text
    seqlen     tokens in a window, and the most of a document
    windows    of each evaluation text, or documents where there is a mark
    calibrate  calibration windows
    """

    model: Path
    calibration: Path
    texts: tuple[Path, ...]
    mark: str | None = None
    seqlen: int = 512
    windows: int = 100
    calibrate: int = 128

    @property
    def missing(self) -> list[str]:
        """What is not there."""
        needed = dict.fromkeys((self.model, self.calibration, *self.texts))
        return [path.name for path in needed if not path.exists()]

    def describe(self) -> dict[str, Any]:
        """Contents and settings as JSON, no paths: rows belong together if this is the same."""
        files = [path for path in sorted(self.model.iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
        settings = asdict(self)
        return {
            "model": file_digest(*files),
            "calibration": file_digest(self.calibration),
            "texts": [file_digest(path) for path in self.texts],
            **{key: settings[key] for key in ("mark", "seqlen", "windows", "calibrate")},
        }

    def context(self) -> str:
        """`describe` in 16 digits."""
        return digest(self.describe())


def reference_jobs(windows: int | None, documents: int | None, calibrate: int) -> list[Job]:
    """The shared reference models on the protocol of the peers' figures; `None`: as many as these have."""
    models, texts = SHARED / "models", SHARED / "text"
    books = texts / "calibration.txt", (texts / "heldout.txt", texts / "wikitext2-test.raw")
    stories = texts / "tinystories.txt"
    return [
        *(
            Job(models / name, *books, windows=windows or 100, calibrate=calibrate)
            for name in ("llama", "llama-outliers")
        ),
        *(
            Job(models / name, stories, (stories,), STORY_MARK, windows=documents or 200, calibrate=calibrate)
            for name in ("tinystories-656k", "stories260k")
        ),
    ]


def parts(text: str, mark: str) -> list[str]:
    """The documents between the marks, empty ones left out."""
    return [piece.strip() for piece in text.split(mark) if piece.strip()]


def last_documents(text: str, mark: str, count: int) -> list[str]:
    """The last `count` documents before the last one, which may be cut off. Raises ValueError if there is none."""
    found = parts(text, mark)[:-1][-count:]
    if not found:
        raise ValueError(f"the text holds no complete document in front of a mark {mark!r}")
    return found


def first_documents(text: str, mark: str, tokens: int) -> list[str]:
    """Documents from the beginning, enough for `tokens` tokens of calibration."""
    return parts(text[: max(CALIBRATION_CHARACTERS, 24 * tokens)], mark)


def calibration_source(job: Job, folder: Path) -> Path:
    """What bitgrain is to calibrate with: the file, or its documents as records of a JSONL file in `folder`."""
    if job.mark is None:
        return job.calibration
    from bitgrain.calibration.text import read_text

    out = folder / "calibration.jsonl"
    if not out.exists():
        documents = first_documents(read_text(job.calibration), job.mark, job.calibrate * job.seqlen)
        out.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    return out


def sequences(job: Job, text: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of each window or document of an evaluation text."""
    from bitgrain.calibration.text import read_text, token_windows

    content = read_text(text)
    if job.mark is None:
        return token_windows(tokenizer, content, job.seqlen, job.windows, special_tokens=True).tolist()
    documents = last_documents(content, job.mark, job.windows)
    encoded = [tokenizer(one, add_special_tokens=True, truncation=False)["input_ids"] for one in documents]
    return [list(ids[: job.seqlen]) for ids in encoded if len(ids) > 1]
