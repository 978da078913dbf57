"""Models of the zoo whose linear layers run packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitgrain.numerics import quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes.scheme import get_scheme
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import find_linear
from bitgrain.runtime.low_bit_linear import put_in_place
from bitgrain.runtime.operators import Operator
from bitgrain.runtime.quant_linear import QuantLinear


def pack_linears(model: Any, scheme: str = "W4A8", others: Mapping[str, str | None] | None = None) -> Any:
    """Put a QuantLinear in the place of every nn.Linear but the head; in place.

    others  other schemes by the ends of paths; None: the layer stays as it is
    """
    for path, layer in list(model.named_modules()):
        own = next((name for end, name in (others or {}).items() if path.endswith(end)), scheme)
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings() and own is not None:
            preset = get_scheme(own)
            row = find_linear(preset.weight, preset.input, "cpu")
            assert isinstance(row, Operator)
            q = quantize(layer.weight.detach().float(), preset.weight)
            kernel = row.kernel(PackedMatrix.of(q), None if preset.input is None else InputQuantizer(preset.input))
            put_in_place(model, path, QuantLinear(kernel, layer.bias, dtype=layer.weight.dtype))
    return model.requires_grad_(False)
