"""Memory that kernels stream through, in large pages where the system has them: fewer misses of address translation.

It is mapped apart from the heap, which what is freed while a model loads would otherwise leave full of holes.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from threading import Lock
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from bitgrain.kernels.native import native

LARGE_PAGE = 2 << 20
CHUNK = 128 << 20
"""Weights of a model share mappings of so many bytes."""
LINE = 64
"""Of a cache: where panels start."""


def large_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] in a mapping of its own, which starts at a large page."""
    mapping, start = _map(nbytes)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=start, count=nbytes) if nbytes else _nothing()


def weight_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] beside those that were asked for before: what lives and dies together shares large pages.

    By itself a weight of a few megabytes would lie in small pages at both ends, or altogether.
    """
    return _weights.take(nbytes) if nbytes else _nothing()


def use_large_pages(x: Tensor) -> None:
    """Move what a tensor on the CPU holds into large pages, where it is large; its address stays."""
    if x.device.type == "cpu" and x.nbytes >= LARGE_PAGE and x.is_contiguous():
        native().move_to_huge_pages(x.data_ptr(), x.nbytes)


def _map(nbytes: int) -> tuple[mmap, int]:
    """A mapping, and where the first large page in it starts."""
    mapping = mmap(-1, nbytes + LARGE_PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
    address = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
    start = -address % LARGE_PAGE
    native().use_huge_pages(address + start, nbytes)
    return mapping, start


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


class _Chunks:
    """The mapping that is being filled; tensors hold mappings, and this does not."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._mapping: ReferenceType[mmap] | None = None
        self._next = self._end = 0

    def take(self, nbytes: int) -> Tensor:
        with self._lock:
            mapping = None if self._mapping is None else self._mapping()
            if mapping is None or self._next + nbytes > self._end:
                size = max(CHUNK, nbytes)
                mapping, self._next = _map(size)
                self._mapping, self._end = ref(mapping), self._next + size
            found = torch.frombuffer(mapping, dtype=torch.uint8, offset=self._next, count=nbytes)
            self._next += -(-nbytes // LINE) * LINE
            return found


_weights = _Chunks()
