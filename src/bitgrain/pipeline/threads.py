"""Pieces of work on several threads: one piece on one thread, so that no result depends on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def work_through(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], workers: int | None = None
) -> Iterator[Result]:
    """The result of each piece, as they come; no more than `workers` pieces (None: as torch has threads) are begun and
    not handed over. The first error ends it, when the pieces that are worked on are done."""
    count, queue = workers or torch.get_num_threads(), iter(pieces)
    with ThreadPoolExecutor(count, thread_name_prefix="bitgrain") as pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                while len(running) < count and (piece := next(queue, None)) is not None:
                    running.add(pool.submit(_alone, work, piece))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _alone(work: Callable[[Piece], Result], piece: Piece) -> Result:
    with single_threaded():
        return work(piece)


@contextmanager
def single_threaded() -> Generator[None]:
    """torch uses one thread in the calling thread, so that no sum is split, and keeps no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
