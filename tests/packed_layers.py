"""Models of the zoo whose linear layers run packed weights."""

from __future__ import annotations

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


def pack_linears(model: Any, scheme: str = "W4A8") -> Any:
    """Put a QuantLinear in the place of every nn.Linear but the head; in place."""
    preset = get_scheme(scheme)
    assert preset.input is not None
    row = find_linear(preset.weight, preset.input, "cpu")
    assert isinstance(row, Operator)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
            q = quantize(layer.weight.detach().float(), preset.weight)
            kernel = row.kernel(PackedMatrix.of(q), InputQuantizer(preset.input))
            put_in_place(model, path, QuantLinear(kernel, layer.bias, dtype=layer.weight.dtype))
    return model.requires_grad_(False)
