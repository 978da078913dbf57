"""A linear layer without a dense weight: what every kind of it shows to code that expects one (docs/decisions/0016)."""

from __future__ import annotations

import torch
from torch import nn

from bitgrain.numerics import QuantSpec
from bitgrain.runtime.lazy_weight import PackedWeight


class PackedLayer(PackedWeight, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """x [.., in] -> x W^T + b, where W [out, in] is a QTensor in some packed form.

    bias        [out] or None, as it is
    dtype       of the dense weight while it is there; follows `.to(dtype)` as a parameter would
    stored      as of `PackedWeight`; None: dtype
    transposed  the layer replaces a Conv1D, which keeps its dense weight [in, out]
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        spec: QuantSpec,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        stored: torch.dtype | None,
        transposed: bool,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)  # Linear's own would make a dense weight
        self.out_features, self.in_features = shape
        self.spec, self.stored, self.transposed = spec, stored or dtype, transposed
        self.register_parameter("bias", bias)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.out_features, self.in_features
