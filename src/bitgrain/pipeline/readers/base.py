"""What a foreign reader is: it loads a checkpoint with none of bitgrain's code, and gives logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor


def _never(tokens: int) -> bool:
    return False


@dataclass(frozen=True)
class Reader:
    """name     as `verify --with` has it
    package     that must be installed; imports: the name of its module
    layouts     that it reads
    logits      (folder or file, ids int64 [texts, tokens]) -> float32 [texts, tokens, vocabulary]; raises ReaderError
    rounds      whether the engine, as it is installed, itself rounds the inputs of quantized layers to 8 bits
                when it reads texts of so many tokens
    """

    name: str
    package: str
    imports: str
    layouts: tuple[str, ...]
    logits: Callable[[Path, Tensor], Tensor]
    rounds: Callable[[int], bool] = _never

    def missing(self) -> str | None:
        """Why it cannot be asked here, or None."""
        try:
            import_module(self.imports)
        except ImportError:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    @property
    def title(self) -> str:
        """With its version."""
        try:
            return f"{self.name} ({self.package} {version(self.package)})"
        except PackageNotFoundError:
            return self.name


class ReaderError(Exception):
    """The engine does not load the file, or cannot run it; the text is its own."""
