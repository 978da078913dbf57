"""Models of the zoo whose linear layers run packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitgrain.numerics import QuantSpec, quantize
from bitgrain.numerics.packed import PackedMatrix
from bitgrain.recipes.scheme import get_scheme
from bitgrain.runtime.activations import InputQuantizer
from bitgrain.runtime.linear_rows import find_linear
from bitgrain.runtime.low_bit_linear import put_in_place
from bitgrain.runtime.operators import Operator
from bitgrain.runtime.quant_linear import QuantLinear
from hand_made import hand_made


def pack_linears(model: Any, scheme: str | QuantSpec = "W4A8", others: Mapping[str, str | None] | None = None) -> Any:
    """Put a QuantLinear in the place of every nn.Linear but the head; in place.

    scheme  a preset; or the spec of random weights, whose inputs stay as they are
    others  other schemes by the ends of paths; None: the layer stays as it is
    """
    for path, layer in list(model.named_modules()):
        own = next((name for end, name in (others or {}).items() if path.endswith(end)), scheme)
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings() and own is not None:
            by_hand = isinstance(own, QuantSpec)
            weight, inputs = (own, None) if by_hand else (get_scheme(own).weight, get_scheme(own).input)
            row = find_linear(weight, inputs, "cpu")
            assert isinstance(row, Operator)
            dense = layer.weight.detach().float()
            q = hand_made(weight, *dense.shape, size=float(dense.std())) if by_hand else quantize(dense, weight)
            kernel = row.kernel(PackedMatrix.of(q), None if inputs is None else InputQuantizer(inputs))
            put_in_place(model, path, QuantLinear(kernel, layer.bias, dtype=layer.weight.dtype))
    return model.requires_grad_(False)
