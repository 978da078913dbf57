"""Contestants in processes of their own, measured in turns.

A machine that others use changes from minute to minute. So everybody is measured in each of several rounds, and medians
over the rounds are compared; between turns nobody works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REST_SECONDS = 0.03
"""Before a turn: threads of the one before have stopped looking for work."""
OWN = ("bitgrain", "torch", "transformers")
"""Libraries of this Python; the others may live in another one."""


class PeerError(Exception):
    """A contestant that cannot do what it was asked; the message says why."""


class Contestant:
    """One library in a process, see contestants/serve.py. Raises PeerError where it is not here."""

    def __init__(self, module: str, threads: int, peers_python: Path) -> None:
        own = module.split("_", 1)[1] in OWN
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable if own else peers_python, "-m", "contestants.serve", module, str(threads)],
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self.versions: dict[str, str] = self.answer()
        except PeerError:
            self.close()
            raise

    def ask(self, do: str, **arguments: object) -> Any:
        """What the method answers. Raises PeerError with what it raised."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError("its process ended") from None
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with status {self.process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise PeerError(found["error"])
        return found["ok"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but need a core."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def rest() -> None:
    """Between two turns."""
    time.sleep(REST_SECONDS)


def say(text: str) -> None:
    """Progress, not results."""
    print(text, file=sys.stderr, flush=True)


def add_options(parser: ArgumentParser, minutes: float) -> None:
    """Options of all benchmarks in rounds."""
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7, help="at most; at least 3 are made")
    parser.add_argument("--minutes", type=float, default=minutes, help="fewer rounds where they would take longer")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="also beside N processes that want a core")
    parser.add_argument("--only", help="contestants whose names contain one of these, with commas between them")
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=Path(os.environ.get("BITGRAIN_PEERS_PYTHON") or sys.executable),
        help="the Python that has the peers installed (BITGRAIN_PEERS_PYTHON); those that it lacks are left out",
    )


def wanted(arguments: Namespace, name: str) -> bool:
    """Whether --only selects a contestant."""
    return arguments.only is None or any(part in name for part in arguments.only.split(","))


def median(values: Sequence[float]) -> float:
    """Of the rounds; the lower one of two in the middle."""
    return sorted(values)[(len(values) - 1) // 2]
