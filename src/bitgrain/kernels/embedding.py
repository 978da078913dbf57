"""Rows of a packed matrix as floats: an embedding's look-up from codes of 1 to 8 bits.

Rows stay as files have them (`numerics.packed`), since single rows are read. The numbers are those of
`QTensor.dequantize`, bit for bit. The twin is `reference.embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import KernelError
from bitgrain.kernels.code_linear import SCALE_DTYPES
from bitgrain.kernels.native import DTYPES, address_of, native
from bitgrain.kernels.packed_linear import gather_rows
from bitgrain.kernels.words import check_words

ZERO_DTYPES = {**DTYPES, torch.uint8: 3, torch.int8: 4}


class CodeEmbedding:
    """E [n, k] as packed rows.

    words  [n, ...], uint8 or int32: rows of unsigned codes as `numerics.packing.pack` has them
    scale  [n, ceil(k / group)]: float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn
    zero   None, or shaped as scale: float32, bfloat16, float16, uint8 or int8; taken off the table's number
    minimum  None, or shaped as scale, of its dtypes; taken off the product with the scale
    """

    def __init__(
        self,
        words: Tensor,
        scale: Tensor,
        bits: int,
        table: Sequence[float],
        *,
        k: int,
        group: int | None = None,
        zero: Tensor | None = None,
        minimum: Tensor | None = None,
        outer: float = 1.0,
    ) -> None:
        """table: what each unsigned code is, 2**bits numbers or fewer (signed integers: from -2**(bits - 1) on).
        outer: one more scale for all (NVFP4), multiplied with the others, and minima, first.

        Raises KernelError for shapes and dtypes that do not fit.
        """
        stride = check_words(words, bits, k)
        shape = (words.shape[0], -(-k // (group or k)))
        if any(part is not None and part.shape != shape for part in (scale, zero, minimum)) or len(table) > 2**bits:
            raise KernelError(
                f"scales {tuple(scale.shape)}, zero points {None if zero is None else tuple(zero.shape)} and a table "
                f"of {len(table)} do not fit {bits}-bit codes {(words.shape[0], k)} in groups of {group or k}"
            )
        known = ((scale, SCALE_DTYPES), (zero, ZERO_DTYPES), (minimum, SCALE_DTYPES))
        if any(part is not None and part.dtype not in dtypes for part, dtypes in known):
            given = ", ".join(str(part.dtype) for part, _ in known if part is not None)
            raise KernelError(f"no kernel for scales, zero points and minima in {given}")
        self.n, self.k = words.shape[0], k
        self.words, self.scale = words, scale.contiguous()
        self.zero = None if zero is None else zero.contiguous()
        self.minimum = None if minimum is None else minimum.contiguous()
        self.handle: Any = native().EmbeddingRows(self.n, k, group or k, bits, [float(one) for one in table], outer)
        self.handle.attach(
            words.data_ptr(), stride, self.scale.data_ptr(), SCALE_DTYPES[scale.dtype],
            address_of(self.zero), 0 if self.zero is None else ZERO_DTYPES[self.zero.dtype],
            address_of(self.minimum), 0 if self.minimum is None else SCALE_DTYPES[self.minimum.dtype],
        )  # fmt: skip

    def __call__(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids [...] integers -> [..., k] in float32, bfloat16 or float16. Raises KernelError for unknown ids."""
        return gather_rows(self.handle.run, ids, self.n, self.k, dtype)
