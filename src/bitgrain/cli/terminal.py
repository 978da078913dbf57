"""Where output goes: results to stdout, everything else to stderr; plain text wherever that is no terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask, and COLUMNS does not say."""


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout (or stderr) as it is now; it prints what it is given, without guessing at colours."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH if plain else None)


def print_error(message: str) -> None:
    """`error: ...` on stderr, the word in red on a terminal."""
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[1;31merror:\x1b[0m {message}" if red else f"error: {message}", file=sys.stderr)


def print_json(data: Any) -> None:
    """To stdout, indented; what JSON has no number for (inf, nan) is null."""
    print(json.dumps(plain_numbers(data), indent=2, ensure_ascii=False))


def write_json(data: Any, where: str) -> None:
    """To a file, or to stdout for `-`. Raises OutputError when the file cannot be written."""
    if where == "-":
        print_json(data)
        return
    try:
        Path(where).write_text(json.dumps(plain_numbers(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{where} cannot be written: {error.strerror}") from error


def check_json_target(where: str | None) -> None:
    """Raise OutputError now for a file that could not be written after minutes of work."""
    if where not in (None, "-") and not Path(where).absolute().parent.is_dir():
        raise OutputError(f"{where} cannot be written: its folder does not exist")


def plain_numbers(value: Any) -> Any:
    """The same with None for inf and nan."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(one) for one in value]
    return value


def quieten_libraries() -> None:
    """Before torch and transformers are imported: no remarks of theirs that a user could do nothing about.

    The environment's own settings win.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns when a process forks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "compressed_tensors"):
        logging.getLogger(name).setLevel(logging.ERROR)


def hide_download_bars() -> None:
    """No bars of the hub's downloads, for output that programs read. Before huggingface_hub is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
