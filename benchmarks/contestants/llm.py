"""A language model with one sequence at a time, as every library has it."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES: tuple[str, ...]


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (largest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def prompt_of(tokens: int) -> list[int]:
    """The same tokens for every library; none of them is special."""
    return [3 + (7919 * i) % 31_997 for i in range(tokens)]


class LlmService:
    """Requests of `serve`. A library says how it opens a file, reads a prompt and takes one step."""

    packages: tuple[str, ...] = ()

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.bare = resident_bytes("VmRSS")

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}

    def open(self, file: str, room: int) -> dict[str, float]:
        """Load `file` for at most `room` tokens; seconds that it took."""
        began = time.perf_counter()
        self.load(file, room)
        return {"seconds": time.perf_counter() - began}

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt, until the logits of its last token are there."""
        ids = prompt_of(tokens)
        self.forget()
        began = time.perf_counter()
        self.read(ids)
        return time.perf_counter() - began

    def decode(self, prompt: int, tokens: int) -> dict[str, Any]:
        """Seconds for `tokens` steps after a prompt, each taking the likeliest token of the step before; the tokens."""
        self.forget()
        token = self.read(prompt_of(prompt))
        found = [token]
        began = time.perf_counter()
        for _ in range(tokens):
            token = self.step(token)
            found.append(token)
        return {"seconds": time.perf_counter() - began, "tokens": found}

    def memory(self) -> dict[str, int]:
        """Bytes: the most that was resident so far, and what was after the imports."""
        return {"peak": resident_bytes("VmHWM"), "bare": self.bare}

    def load(self, file: str, room: int) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Start a new sequence."""
        raise NotImplementedError

    def read(self, ids: list[int]) -> int:
        """Take a prompt; the likeliest next token."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """Take one token; the likeliest next one."""
        raise NotImplementedError
