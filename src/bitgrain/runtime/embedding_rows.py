"""The look-up of an embedding's rows: kernels that hold a packed weight as files do, and their operator rows.

Rows of an embedding that is the head's weight too come out of the head's kernel (`PackedKernel.rows`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitgrain.kernels.embedding import CodeEmbedding
from bitgrain.kernels.reference.embedding import look_up
from bitgrain.kernels.words import unpack_words
from bitgrain.numerics import QTensor, QuantSpec
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.kernel_arguments import refuse_rows, row_scales
from bitgrain.runtime.operators import ANY, Operator, find_serving, register_operator


class EmbeddingKernel:
    """A packed weight [rows, in], of a spec that `refuse_rows` has no word against."""

    def __init__(self, weight: PackedMatrix) -> None:
        self._fill(weight)

    def _fill(self, weight: PackedMatrix) -> None:
        self.spec, self.shape, self._weight = weight.spec, weight.shape, weight
        given = row_scales(weight)
        assert given.table is not None
        assert not isinstance(given.table, torch.dtype)
        assert given.zero is None or isinstance(given.zero, Tensor)
        self._embedding = CodeEmbedding(
            weight.words, given.scale, weight.spec.format.bits, given.table, k=weight.shape[1],
            group=weight.spec.granularity.tile(weight.shape)[1], zero=given.zero, minimum=given.minimum,
            outer=given.outer,
        )  # fmt: skip

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """For ids [...]: [..., in], what `QTensor.dequantize` gives, bit for bit."""
        return self._embedding(ids, dtype)

    def refill(self, weight: PackedMatrix) -> None:
        """Hold another weight of the same spec and shape."""
        self._fill(weight)

    def tensors(self) -> Mapping[str, Tensor]:
        """What it holds, as bytes; the scales of scales apart."""
        found = {"words": self._weight.words}
        for name, part in (("scale", self._weight.scale), ("minimum", self._weight.minimum)):
            if part is not None:
                found[name] = part if isinstance(part, Tensor) else part.codes
        if self._weight.zero is not None:
            found["zero"] = self._weight.zero
        return {name: tensor.view(torch.uint8) for name, tensor in found.items()}

    def qtensor(self) -> QTensor:
        """The weight as it was given, unpacked."""
        return self._weight.unpack()

    def describe(self) -> str:
        """For the printed model."""
        return self.spec.describe()

    def __getstate__(self) -> dict[str, PackedMatrix]:
        return {"weight": self._weight}

    def __setstate__(self, state: dict[str, PackedMatrix]) -> None:
        self._fill(state["weight"])


class EmbeddingTwin(EmbeddingKernel):
    """The same by the readable twin."""

    def _fill(self, weight: PackedMatrix) -> None:
        self.spec, self.shape, self._weight = weight.spec, weight.shape, weight

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See `EmbeddingKernel`."""
        given, bits = row_scales(self._weight), self.spec.format.bits
        assert given.table is not None
        codes = unpack_words(self._weight.words, bits, self.shape[1])
        return look_up(
            codes, given.scale, given.table, ids, dtype, group=self.spec.granularity.tile(self.shape)[1],
            zero=given.zero, minimum=given.minimum, outer=given.outer,
        )  # fmt: skip


_FORMATS = ("any format of up to 8 bits", "row numbers")


def register_embedding() -> None:
    """Put the rows into the table. Done when this module is imported."""
    arithmetic = "float32, rounded once: the dequantized numbers"
    register_operator(Operator("embedding", _FORMATS, EmbeddingKernel, "cpu", False, refuse_rows, arithmetic))
    register_operator(Operator("embedding", _FORMATS, EmbeddingTwin, ANY, True, refuse_rows, "the same"))


def find_embedding(weight: QuantSpec, device: str, *, reference: bool = False) -> Operator | str:
    """The row for an embedding's spec, or why there is none. Its kernel makes an `EmbeddingKernel` of the weight."""
    return find_serving("embedding", (weight,), device, reference=reference)


register_embedding()
