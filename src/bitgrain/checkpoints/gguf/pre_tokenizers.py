"""How byte-level tokenizers cut text before they merge: llama.cpp's names (`tokenizer.ggml.pre`) and what each is.

llama.cpp's converter knows a tokenizer by a hash of what it makes of a fixed text. Here it is known by its own
definition in tokenizer.json: the expressions of its splits, and whether whole words that are tokens are taken without
merging. What each name stands for: llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"{_UPPER}*{_LOWER}+{_SHORT}|{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text: by these expressions, one after the other; `aliases`: llama.cpp's other names for it."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    aliases: tuple[str, ...] = ()


PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        "gpt-2",
        (GPT2,),
        aliases=("phi-2", "mpt", "olmo", "jais", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v2-es"),
    ),
    PreTokenizer(
        "llama-bpe", (_LLAMA3,), True, ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
    ),
    PreTokenizer("dbrx", (_LLAMA3,), aliases=("smaug-bpe",)),
    PreTokenizer(
        "qwen2",
        (_LLAMA3.replace(r"\p{N}{1,3}", _DIGIT),),
        aliases=("deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open"),
    ),
    PreTokenizer("qwen35", (_QWEN35,)),
    PreTokenizer("tekken", (_TEKKEN,), True),
    PreTokenizer("gpt-4o", (_GPT4O,), aliases=("llama4", "kanana2", "talkie")),
    PreTokenizer(
        "default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")
    ),  # what llama.cpp takes where no name is told
    PreTokenizer(
        "starcoder", (_DIGIT, GPT2), aliases=("refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
    ),
)
NAMES: Mapping[str, PreTokenizer] = {name: one for one in PRE_TOKENIZERS for name in (one.name, *one.aliases)}


def find_pre_tokenizer(component: Mapping[str, Any] | None, ignore_merges: bool) -> PreTokenizer | None:
    """The one that a tokenizer.json with this `pre_tokenizer` has; None for one that is not known."""
    splits = _splits_of(component)
    for one in PRE_TOKENIZERS:
        if one.splits == splits and one.ignore_merges == ignore_merges:
            return one
    return None


def component_of(one: PreTokenizer) -> dict[str, Any]:
    """The inverse: what tokenizer.json says."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in one.splits
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def _splits_of(component: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions of a chain that ends in bytes; None for any other."""
    if component is None:
        return None
    parts: list[Mapping[str, Any]] = component["pretokenizers"] if component["type"] == "Sequence" else [component]
    found: list[str] = []
    for part in parts[:-1]:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            found.append(part["pattern"].get("Regex", ""))
        elif part["type"] == "Digits" and part["individual_digits"]:
            found.append(_DIGIT)
        else:
            return None
    last = parts[-1] if parts else {"type": ""}
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    return (*found, GPT2) if last.get("use_regex", True) else tuple(found)
