"""Static input scales by what they do to the layer's output, instead of by the inputs alone.

A Range sees numbers; the layer sees x W^T. Clipping a rare large input can cost much where its column of W is large,
and nothing where it is small. So the search takes the limits of all inputs, shrinks them step by step, and keeps the
scale with the least error |(Q(x) - x) W^T|^2 over given tokens: the layer-output criterion of GPTQ and AWQ, applied to
activations. Each token counts by 1 / (|x W^T|^2 + its mean): the norms behind it make the errors of tokens with large
outputs small, and the residual stream those of tokens with small ones. On the reference model that is what the KL
divergence follows; plain squares clip too late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.observers import State, StaticInput, static_input
from bitgrain.numerics.quantize import check_finite, fake_quantize
from bitgrain.numerics.ranges import MinMax
from bitgrain.numerics.sums import row_sums

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.16, 0.13, 0.1)
"""Of the smallest and largest input: the limits that are tried."""


def search_input(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: QuantSpec,
    *,
    low: float | None = None,
    high: float | None = None,
    counts: Tensor | None = None,
    fractions: Sequence[float] = FRACTIONS,
    name: str = "activation",
) -> tuple[StaticInput, float]:
    """The scale for inputs x [tokens, in] of layers with `weights` [out, in] that share them, and its relative error.

    low, high  smallest and largest input over all of the calibration, where x is a part of it
    counts     [tokens] how much each token counts; None: what `token_counts` gives. Where x is a cluster of the input
               channels, that of all of them
    The error is the weighted sum of squares of what it changes in the outputs, relative to that of the outputs. Of
    equal candidates the widest is kept. Raises SchemeError for a spec that is not static and per tensor, or without
    tokens; NumericsError for NaN and Inf.
    """
    if x.numel() == 0:
        raise SchemeError(f"{name}: there are no inputs to choose a static scale by")
    x = x.to(torch.float32)
    check_finite(x, name)
    low = float(x.amin()) if low is None else low
    high = float(x.amax()) if high is None else high
    powers = _powers(weights, x)
    outputs = powers(x)
    counts = _counts(outputs) if counts is None else counts
    wide = replace(spec, restricted=False)  # engines clip to all codes
    best: tuple[float, StaticInput] | None = None
    for fraction in fractions:
        static = static_input(State(MinMax(), low * fraction, high * fraction, x.numel()), spec, name)
        zero = None if static.zero is None else static.zero.to(x.device)
        change = fake_quantize(x, wide, scale=static.scale.to(x.device, torch.float32), zero=zero) - x
        error = float(row_sums(powers(change) * counts))
        if best is None or error < best[0]:
            best = error, static
    assert best is not None
    whole = float(row_sums(outputs * counts))
    return best[1], best[0] / whole if whole > 0 else 0.0


def token_counts(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[tokens]: how much each token of the inputs x [tokens, in] of layers with `weights` [out, in] counts."""
    x = x.to(torch.float32)
    return _counts(_powers(weights, x)(x))


def _counts(outputs: Tensor) -> Tensor:
    if not bool(outputs.any()):  # zeros: every scale will do
        return torch.ones_like(outputs)
    return 1 / (outputs + row_sums(outputs) / len(outputs))


def _powers(weights: Sequence[Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Inputs [tokens, in], like x, to |x W^T|^2 [tokens]."""
    total = torch.cat([weight.to(x.device, torch.float32) for weight in weights])
    if total.shape[0] <= total.shape[1]:
        return lambda inputs: row_sums((inputs @ total.T).square())
    gram = total.T @ total
    return lambda inputs: row_sums((inputs @ gram) * inputs).clamp(min=0)
