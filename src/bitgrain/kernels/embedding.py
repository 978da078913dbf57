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
from bitgrain.kernels.native import DTYPES, native
from bitgrain.kernels.packed_linear import gather_rows
from bitgrain.kernels.words import check_words

ZERO_DTYPES = {**DTYPES, torch.uint8: 3, torch.int8: 4}


class CodeEmbedding:
    """E [n, k] as packed rows.

    words  [n, ...], uint8 or int32: rows of unsigned codes as `numerics.packing.pack` has them
    scale  [n, ceil(k / group)]: float32, bfloat16, float16, float8_e8m0fnu or float8_e4m3fn
    zero   None, or shaped as scale: float32, bfloat16, float16, uint8 or int8; taken off the table's number
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
        outer: float = 1.0,
    ) -> None:
        """table: what each unsigned code is, 2**bits numbers or fewer (signed integers: from -2**(bits - 1) on).
        outer: one more scale for all (NVFP4), multiplied with the others first.

        Raises KernelError for shapes and dtypes that do not fit.
        """
        stride = check_words(words, bits, k)
        shape = (words.shape[0], -(-k // (group or k)))
        if scale.shape != shape or (zero is not None and zero.shape != shape) or len(table) > 2**bits:
            raise KernelError(
                f"scales {tuple(scale.shape)}, zero points {None if zero is None else tuple(zero.shape)} and a table "
                f"of {len(table)} do not fit {bits}-bit codes {(words.shape[0], k)} in groups of {group or k}"
            )
        if scale.dtype not in SCALE_DTYPES or (zero is not None and zero.dtype not in ZERO_DTYPES):
            raise KernelError(
                f"no kernel for scales {scale.dtype} and zero points {zero.dtype if zero is not None else ''}"
            )
        self.n, self.k = words.shape[0], k
        self.words, self.scale = words, scale.contiguous()
        self.zero = None if zero is None else zero.contiguous()
        self.handle: Any = native().EmbeddingRows(self.n, k, group or k, bits, [float(one) for one in table], outer)
        self.handle.attach(
            words.data_ptr(), stride, self.scale.data_ptr(), SCALE_DTYPES[scale.dtype],
            0 if self.zero is None else self.zero.data_ptr(), 0 if self.zero is None else ZERO_DTYPES[self.zero.dtype],
        )  # fmt: skip

    def __call__(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids [...] integers -> [..., k] in float32, bfloat16 or float16. Raises KernelError for unknown ids."""
        return gather_rows(self.handle.run, ids, self.n, self.k, dtype)
