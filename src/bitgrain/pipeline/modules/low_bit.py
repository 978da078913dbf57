"""Rounding a module in memory so that its linear layers hold packed codes, and no dense weight."""

from __future__ import annotations

from torch import nn

from bitgrain.numerics import QTensor
from bitgrain.pipeline.modules.quantize import quantize_
from bitgrain.recipes import Recipe, Scheme
from bitgrain.runtime.low_bit_linear import hold_low_bit_


def low_bit_(module: nn.Module, scheme: str | Scheme | Recipe) -> dict[str, list[QTensor]]:
    """`quantize_`, and linear layers then keep their weights packed (`runtime.low_bit_linear.LowBitLinear`).

    Returns the QTensors of what had to stay dense in memory, though rounded, by parameter name: stacks of experts,
    embeddings, tied heads. Raises as `quantize_` does.
    """
    found = quantize_(module, scheme)
    weights = {name.removesuffix(".weight"): parts[0] for name, parts in found.items() if name.endswith(".weight")}
    packed = {f"{path}.weight" for path in hold_low_bit_(module, weights)}
    return {name: parts for name, parts in found.items() if name not in packed}
