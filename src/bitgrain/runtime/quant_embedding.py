"""An embedding whose rows are looked up in a packed weight: no dense weight at any moment. Inference only."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bitgrain.numerics.packed import PackedMatrix
from bitgrain.runtime.kernel_holder import LAYERS, HeldKernel, KernelHolder


class RowKernel(HeldKernel, Protocol):
    """A packed weight whose rows can be had: `EmbeddingKernel`, or the `PackedKernel` of a tied head."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """For ids [...]: [..., in], what `QTensor.dequantize` gives, bit for bit."""
        ...

    def refill(self, weight: PackedMatrix) -> None:
        """Hold another weight of the same spec and shape, for all layers that share this kernel."""
        ...


class QuantEmbedding(KernelHolder[RowKernel], nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """ids [...] -> rows [..., features] in the dtype of the weight; made by `quant_embedding`.

    Rows are rounded to the dtype that the weight had when it was quantized, then to that of the module: what an
    embedding with the dequantized weight gives, bit for bit.
    """

    def _refill(self, weight: PackedMatrix) -> None:
        self.kernel.refill(weight)
        self.hold(self.kernel)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, quant_embedding_rows(input, self._key, self.embedding_dim, self.like.dtype))
        return self.look_up(input)

    @torch.no_grad()
    def look_up(self, input: Tensor) -> Tensor:
        """The rows of ids, before a subclass does anything with them. Raises KernelError for unknown ids."""
        rows = self.kernel.rows(input, self.stored).to(self.like.dtype)
        if self.max_norm is not None:
            flat = rows.view(-1, self.embedding_dim)
            torch.embedding_renorm_(flat, torch.arange(len(flat)), self.max_norm, self.norm_type)
        return rows

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kernel.describe()}"


def quant_embedding(
    old: nn.Embedding, kernel: RowKernel, stored: torch.dtype | None = None, *, tied: bool = False
) -> QuantEmbedding:
    """What stands in the place of `old`, with all that it has but its weight.

    stored  the dtype that the weight had when it was quantized; None: that of the weight of `old`
    tied    as of `KernelHolder`
    Of a class of its own (Gemma's scales what it looks up) it stays an instance, and its forward is run.
    """
    new, dtype = _empty(type(old)), old.weight.dtype
    for name, value in vars(old).items():
        new.__dict__[name] = value.copy() if isinstance(value, dict) else value
    del new.__dict__["_parameters"]["weight"]
    new.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
    new.stored, new.tied = stored or dtype, tied
    new.hold(kernel)
    return new


@cache
def _class_like(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """QuantEmbedding, behind the methods of a subclass of nn.Embedding."""
    if kind is nn.Embedding:
        return QuantEmbedding

    bases: Any = (kind, QuantEmbedding)

    def reduce(self: QuantEmbedding, _: Any) -> tuple[Any, ...]:
        return _empty, (kind,), self.__getstate__()

    return type(f"Quant{kind.__name__}", bases, {"__reduce_ex__": reduce})


def _empty(kind: type[nn.Embedding]) -> QuantEmbedding:
    return _class_like(kind).__new__(_class_like(kind))


@torch.library.custom_op("bitgrain::quant_embedding", mutates_args=())
def quant_embedding_rows(ids: Tensor, key: int, features: int, dtype: torch.dtype) -> Tensor:
    """The rows of the layer of this number in a compiled graph."""
    return cast(QuantEmbedding, LAYERS[key]).look_up(ids)


@quant_embedding_rows.register_fake
def _(ids: Tensor, key: int, features: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((*ids.shape, features), dtype=dtype, device=ids.device)
