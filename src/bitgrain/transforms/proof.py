"""The numeric proof of every rewrite: the output before and after it, on calibration data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.errors import NumericsError

TOLERANCE = 1e-4
"""How far the output may move, relative to its spread: far above float32's rounding, far below any wrong rewrite."""

_REROUTED = 0.01
"""Part of the tokens that may take other experts, because two of them were equally good within rounding."""


def routes(module: nn.Module) -> bool:
    """Whether tokens choose their way through the module, so that rounding may send one another way."""
    return any(parameter.ndim == 3 for parameter in module.parameters()) or any(
        "expert" in path.rpartition(".")[2] for path, _ in module.named_modules()
    )


def difference(before: Tensor, after: Tensor, routed: bool = False) -> float:
    """Largest |after - before| [tokens.., features], relative to the standard deviation of `before`.

    `routed`: the worst hundredth of the tokens is left out. NaN, Inf or other shapes give infinity.
    """
    if before.shape != after.shape:
        return float("inf")
    before, after = before.double(), after.double()
    of_token = (after - before).abs().flatten(0, -2).amax(-1).sort().values
    allowed = int(_REROUTED * len(of_token)) if routed else 0
    spread = before.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    largest = of_token[len(of_token) - 1 - allowed] / spread
    return float(largest) if bool(torch.isfinite(of_token).all() & torch.isfinite(largest)) else float("inf")


def check_same(before: Tensor, after: Tensor, where: str, what: str, routed: bool = False) -> float:
    """The difference. Raises NumericsError that names the place and the rewrite if it exceeds the tolerance."""
    found = difference(before, after, routed)
    if not found <= TOLERANCE:
        raise NumericsError(
            f"{where}: {what} changed the full-precision output by {found:.2g} of its spread (allowed: {TOLERANCE:g}); "
            "leave this transform out of the recipe, and please report the architecture"
        )
    return found
