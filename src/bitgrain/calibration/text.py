"""Text and tokens: what calibration and evaluation read.

One text becomes one stream of tokens, cut into windows that do not overlap; the rest is dropped. This is how
the field measures perplexity, so numbers are comparable only for the same text, window length and leading
special tokens (`token_windows`).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import LongTensor, Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bitgrain.checkpoints.gguf.container import open_gguf
from bitgrain.checkpoints.gguf.tokenizer_reader import read_tokenizer
from bitgrain.errors import BitgrainError, TextError

__all__ = ["check_ids", "load_tokenizer", "read_file", "read_text", "token_ids", "token_windows"]

TEXT_SUFFIXES = {".txt", ".md"}

# Files of which any one is a tokenizer; tokenizer.json is preferred wherever it exists.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def read_text(path: str | Path) -> str:
    """The text of a file, or of the *.txt and *.md files of a folder in the order of their names.

    UTF-8; line ends become "\\n". The files of a folder (not of its subfolders) are joined by an empty line.

    Raises TextError: missing, unreadable, empty (white space only), or not UTF-8 (names the byte offset).
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise TextError(f"text folder {path} holds no .txt or .md file: name a file, or put text there")
        text = "\n\n".join(read_file(file) for file in files)
    else:
        text = read_file(path)
    if not text or text.isspace():
        raise TextError(f"text {path} is empty: give a file with at least one window of text")
    return text


def read_file(path: Path) -> str:
    """The text of one UTF-8 file, empty or not; line ends become "\\n". Raises TextError as `read_text`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"text {path} does not exist: check the path") from None
    except OSError as error:
        raise TextError(f"text {path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"text {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; nothing is fetched from a network.

    tokenizer.json is taken as it stands whenever it exists, with the settings of tokenizer_config.json if that
    is there. AutoTokenizer may instead rebuild the pipeline from the class that tokenizer_config.json names, and
    then the ids can differ from those of the file (LlamaTokenizer drops unknown characters where the file says
    <unk>). AutoTokenizer serves the folders without tokenizer.json, and custom code if `trust_remote_code`.

    A GGUF file gives the tokenizer that its metadata describe.

    Raises TextError: no tokenizer there, a corrupt one, or one that needs custom code or a missing package.
    """
    folder = Path(folder)
    if folder.is_file():
        return _load(folder, lambda: _gguf_tokenizer(folder))
    custom = trust_remote_code and _has_custom_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not custom and file.is_file():
        _check_tokenizer_file(file)
        if (folder / "tokenizer_config.json").is_file():
            return _load(folder, lambda: PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
        return _load(folder, lambda: PreTrainedTokenizerFast(tokenizer_file=str(file)))
    present = any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))
    if not present and not custom:
        raise TextError(
            f"tokenizer missing: {folder} has no tokenizer.json (nor an older tokenizer file); "
            "copy it from the original model, or name the model that has it"
        )
    return _load(
        folder,
        lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code),
    )


def _gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    content, special = read_tokenizer(open_gguf(file).metadata, str(file))
    backend = Tokenizer.from_str(json.dumps(content))
    ids = {"bos": special.bos, "eos": special.eos, "unk": special.unknown, "pad": special.padding}
    marks = {f"{name}_token": backend.id_to_token(one) for name, one in ids.items() if one is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    tokenizer.chat_template = special.chat_template
    return tokenizer


def _has_custom_tokenizer(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    return "AutoTokenizer" in (_read_json(config).get("auto_map") or {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise TextError(f"{path} is corrupt: {error}; copy it again from the original model") from error
    if not isinstance(value, dict):
        raise TextError(f"{path} is corrupt: not a JSON object; copy it again from the original model")
    return value


def _check_tokenizer_file(file: Path) -> None:
    content = _read_json(file)
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("added_tokens", []), list):
        raise TextError(f"{file} is corrupt: not a tokenizer; copy it again from the original model")
    if (file.parent / "tokenizer_config.json").is_file():
        _read_json(file.parent / "tokenizer_config.json")


def _load(folder: Path, loader: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    try:
        return loader()
    except BitgrainError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TextError(
            f"tokenizer of {folder} cannot be loaded: {reason[0]}; if it has code of its own, allow that with "
            "trust_remote_code, otherwise copy the tokenizer files again from the original model"
        ) from error


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seqlen: int,
    max_windows: int | None = None,
    *,
    vocab_size: int | None = None,
    special_tokens: bool = False,
) -> LongTensor:
    """Token ids int64 [n, seqlen]: the text tokenized once, cut in windows that do not overlap, the rest dropped.

    `special_tokens` adds what the tokenizer puts around a text, once around the whole of it and not around each
    window: usually one BOS in front, which shifts every window by one token. Published perplexities mostly have
    it. `vocab_size` is the model's: every id of the windows must be below it.

    Raises TextError: not even one window, or an id that the model does not have.
    """
    if seqlen < 1 or (max_windows is not None and max_windows < 1):
        raise TextError(f"windows of {seqlen} tokens, at most {max_windows}: both must be at least 1")
    ids = token_ids(tokenizer, text, None if max_windows is None else max_windows * seqlen, special_tokens)
    count = len(ids) // seqlen if max_windows is None else min(len(ids) // seqlen, max_windows)
    if count == 0:
        raise TextError(
            f"the text has {len(ids)} tokens and one window needs {seqlen}: give a longer text or a shorter window"
        )
    windows = torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)
    check_ids(windows, vocab_size)
    return windows  # type: ignore[return-value]


def check_ids(windows: Tensor, vocab_size: int | None) -> None:
    """TextError if a token id of `windows` is none of the model's `vocab_size`; None: not known."""
    largest = int(windows.max())
    if vocab_size is not None and largest >= vocab_size:
        raise TextError(
            f"the tokenizer gives token id {largest} and the model has {vocab_size} ids (0 to {vocab_size - 1}): "
            "they do not belong together; use the tokenizer that came with the model"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None, special_tokens: bool) -> list[int]:
    """Ids of the text, or (count) at least its first `count`, as far as there are so many; see `token_windows`.

    The same ids for any `count`, but for special tokens at the end of the text.
    """
    ids = None if count is None else _leading_ids(tokenizer, text, count, special_tokens)
    return _all_ids(tokenizer, text, special_tokens) if ids is None else ids


def _all_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> list[int]:
    # Truncation and padding may be on in tokenizer.json itself; verbose=False: length is no matter here.
    encoding = tokenizer(
        text,
        add_special_tokens=special_tokens,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoding["input_ids"])


# --- Huge texts: the first tokens from the first part of the text, where that is provably the same ---------------
#
# The byte-level BPE family first splits the text by a regular expression that is matched from left to right,
# and then encodes the pieces one by one. Under each expression below, a piece that reaches a cut between an ASCII
# letter and a blank or line end always ends there: no alternative that consumes or looks at the letter goes on
# to the blank, and only blanks are ever matched with a look at what follows. So the pieces in front of such a cut,
# and with them their tokens, do not depend on what is behind it. Any other pipeline is tokenized as a whole.

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # = ByteLevel(use_regex)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LOCAL_SPLITS = {GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT}

CUT = re.compile(r"[A-Za-z](?=[ \n])")
CUT_SEARCH = 4096  # characters in front of the wanted length among which a cut is looked for


def _leading_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int, special_tokens: bool) -> list[int] | None:
    """At least the first `count` ids of the text from a part of it, or None: tokenize all of it."""
    length = 8 * count + CUT_SEARCH  # English has 4 to 5 characters a token
    if length >= len(text) or not _splits_locally(tokenizer):
        return None
    while length < len(text):
        cuts = [match.end() for match in CUT.finditer(text, length - CUT_SEARCH, length)]
        if cuts:
            ids = _all_ids(tokenizer, text[: cuts[-1]], special_tokens)
            # special tokens at the end belong behind the whole text: they must not be among those used
            added = tokenizer.num_special_tokens_to_add() if special_tokens else 0
            if len(ids) - added >= count:
                return ids
        length *= 2
    return None


def _splits_locally(tokenizer: PreTrainedTokenizerBase) -> bool:
    if type(tokenizer) is not PreTrainedTokenizerFast:
        return False  # a subclass may prepare the text in its own way
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if type(model).__name__ != "BPE" or getattr(model, "dropout", None):
        return False
    # NFC never joins a blank with the letter in front of it; other normalizers are not looked into
    if backend.normalizer is not None and _component(backend.normalizer) != {"type": "NFC"}:
        return False
    if backend.pre_tokenizer is None or not _is_local_split(_component(backend.pre_tokenizer)):
        return False
    # an added token such as "end of text" could reach over the cut; one that begins with blanks cannot
    return not any(re.search(r"\S\s", token.content) for token in tokenizer.added_tokens_decoder.values())


def _component(component: Any) -> dict[str, Any]:
    return json.loads(component.__getstate__())


def _is_local_split(component: dict[str, Any]) -> bool:
    if component["type"] == "ByteLevel":
        return component.get("use_regex", True)
    if component["type"] != "Sequence" or len(component["pretokenizers"]) != 2:
        return False
    split, byte_level = component["pretokenizers"]
    return (
        split["type"] == "Split"
        and split["pattern"].get("Regex") in LOCAL_SPLITS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and byte_level["type"] == "ByteLevel"
        and not byte_level["use_regex"]
    )
