"""Work on calibration batches in several threads, in an order and in pieces that do not depend on their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def single_threaded() -> Generator[None]:
    """torch uses one thread in the calling thread: no sum is split, so no result depends on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool:
    """`workers` threads, each with torch's own parallelism off."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="bitgrain")

    def map(self, work: Callable[[T], R], items: Iterable[T], grad: bool = False) -> Iterator[R]:
        """`work` of each item, in the order of the items, whichever is ready first; few results wait at a time."""

        def one(item: T) -> R:
            with single_threaded(), torch.set_grad_enabled(grad):
                return work(item)

        if self.workers == 1:
            yield from (one(item) for item in items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(one, item))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
