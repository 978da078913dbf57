"""How many bytes each tensor type of ggml takes: all that the container needs to know of them.

Numbers: `enum ggml_type` and the block structures of ggml (ggml.h, ggml-common.h). Types that ggml uses in memory
only (Q8_1, Q8_K) are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """A type's number in files; `size` elements of one row take `nbytes` bytes."""

    name: str
    number: int
    size: int
    nbytes: int

    def row_bytes(self, cols: int) -> int | None:
        """Bytes of a row of `cols` elements; None where it is not whole blocks."""
        return None if cols % self.size else cols // self.size * self.nbytes


_ALL = (
    Storage("F32", 0, 1, 4),
    Storage("F16", 1, 1, 2),
    Storage("Q4_0", 2, 32, 18),
    Storage("Q4_1", 3, 32, 20),
    Storage("Q5_0", 6, 32, 22),
    Storage("Q5_1", 7, 32, 24),
    Storage("Q8_0", 8, 32, 34),
    Storage("Q2_K", 10, 256, 84),
    Storage("Q3_K", 11, 256, 110),
    Storage("Q4_K", 12, 256, 144),
    Storage("Q5_K", 13, 256, 176),
    Storage("Q6_K", 14, 256, 210),
    Storage("IQ2_XXS", 16, 256, 66),
    Storage("IQ2_XS", 17, 256, 74),
    Storage("IQ3_XXS", 18, 256, 98),
    Storage("IQ1_S", 19, 256, 50),
    Storage("IQ4_NL", 20, 32, 18),
    Storage("IQ3_S", 21, 256, 110),
    Storage("IQ2_S", 22, 256, 82),
    Storage("IQ4_XS", 23, 256, 136),
    Storage("I8", 24, 1, 1),
    Storage("I16", 25, 1, 2),
    Storage("I32", 26, 1, 4),
    Storage("I64", 27, 1, 8),
    Storage("F64", 28, 1, 8),
    Storage("IQ1_M", 29, 256, 56),
    Storage("BF16", 30, 1, 2),
    Storage("TQ1_0", 34, 256, 54),
    Storage("TQ2_0", 35, 256, 66),
    Storage("MXFP4", 39, 32, 17),
    Storage("NVFP4", 40, 64, 36),
    Storage("Q1_0", 41, 128, 18),
    Storage("Q2_0", 42, 64, 18),
)
STORAGES: Mapping[str, Storage] = {storage.name: storage for storage in _ALL}
BY_NUMBER: Mapping[int, Storage] = {storage.number: storage for storage in _ALL}
