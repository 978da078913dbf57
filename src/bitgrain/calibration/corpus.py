"""Text that is on every machine: the sources of Python's own standard library.

The built-in demo model learned from this text, so it is the right text to calibrate and to evaluate it with, it
needs no network, and bitgrain ships nobody's prose. The split is by module: a held-out module is never part of
the calibration text, which is also what the demo model was trained on.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from pathlib import Path
from typing import Literal

from bitgrain.errors import TextError

__all__ = ["HELD_OUT_MODULES", "Split", "builtin_modules", "builtin_text"]

Split = Literal["calibration", "evaluation"]

# Held out for evaluation: in every CPython since 3.11, single files, of varied styles (numbers, text, protocols,
# data structures, command lines, long docstrings). Changing this list makes the demo model's held-out numbers void,
# because it has read every other module.
HELD_OUT_MODULES: tuple[str, ...] = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "colorsys",
    "contextlib",
    "difflib",
    "fractions",
    "graphlib",
    "heapq",
    "netrc",
    "pprint",
    "queue",
    "random",
    "reprlib",
    "shlex",
    "smtplib",
    "statistics",
    "textwrap",
    "timeit",
    "wave",
)

# Not prose or code that a person wrote as part of the library: tests, generated tables, demos, bundles, and
# packages that some Pythons have and others do not.
_EXCLUDED_PACKAGES = frozenset(
    {
        "__hello__",
        "__phello__",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "test",
        "tests",
        "turtledemo",
    }
)
_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")  # written when this Python was built: its own paths

# Far under what any complete standard library holds; a stripped one must not pass for the text it is not.
_LEAST_BYTES: dict[str, int] = {"calibration": 2_000_000, "evaluation": 200_000}


def builtin_modules(split: Split) -> list[tuple[str, str]]:
    """The modules of one split as pairs of dotted name and source, sorted by name.

    Raises TextError where the running Python has no readable library sources (zipped, embedded or stripped).
    """
    if split not in _LEAST_BYTES:
        raise TextError(f"unknown split {split!r} of the built-in text: use 'calibration' or 'evaluation'")
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: list[tuple[str, str]] = []
    for name, path in sorted(_module_files(root).items()):
        if (name.partition(".")[0] in HELD_OUT_MODULES) == (split == "evaluation"):
            try:
                with tokenize.open(path) as file:  # honours the coding line; newlines become \n everywhere
                    modules.append((name, file.read()))
            except (OSError, SyntaxError, UnicodeDecodeError) as error:
                raise TextError(
                    f"cannot read {path} of Python's standard library ({error}): "
                    "repair this Python installation, or name a text file of your own"
                ) from error
    if sum(len(source.encode()) for _, source in modules) < _LEAST_BYTES[split]:
        raise TextError(
            f"the sources of Python's standard library are not under {root} (a zipped, embedded or stripped "
            "Python?), so there is no built-in text: use a full Python installation, or name a text file of your own"
        )
    return modules


def builtin_text(split: Split, *, max_bytes: int | None = None) -> str:
    """One split of the running Python's standard library as one string, modules in the order of their names.

    `max_bytes` bounds the UTF-8 length; the cut is never inside a character. The same Python release gives the same
    text on every machine that has it whole. Between releases the text differs a little, and so do numbers measured
    on it: compare only perplexities that were measured under one Python version.

    Raises TextError where the running Python has no readable library sources, or `max_bytes` is not positive.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise TextError(f"max_bytes is {max_bytes}: give a positive number of bytes, or none for the whole text")
    text = "\n".join(source for _, source in builtin_modules(split))
    if max_bytes is None:
        return text
    return text.encode()[:max_bytes].decode(errors="ignore")


def _module_files(root: Path) -> dict[str, Path]:
    """Every module under the library folder that is part of the text, by dotted name; a package is its __init__."""
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        # site-packages, dist-packages, lib-dynload and config-* are no identifiers
        folders[:] = [f for f in folders if f.isidentifier() and f not in _EXCLUDED_PACKAGES and f != "__pycache__"]
        for file_name in names:
            stem, suffix = os.path.splitext(file_name)
            if suffix != ".py" or not stem.isidentifier() or stem.startswith(_EXCLUDED_PREFIXES):
                continue
            if stem in _EXCLUDED_PACKAGES:
                continue
            name = ".".join(parts if stem == "__init__" and parts else (*parts, stem))
            files[name] = Path(folder, file_name)
    return files
