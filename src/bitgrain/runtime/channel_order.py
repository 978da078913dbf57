"""Norms that write their channels in another order: what cannot be folded of RPTQ (arXiv 2304.01089).

A norm's channel is tied to a channel of the residual stream, so no weight can move it; its gain and bias stay as they
are, and its output is gathered. A kernel of a norm does so while it writes; here it is a step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import CheckpointError


def reorder_outputs(module: nn.Module, order: Tensor) -> None:
    """From now on the output [.., n] of `module` comes in this order (int64 [n]: which channel comes to each place). A
    second order replaces the first."""
    if not hasattr(module, "output_order"):
        module.register_forward_hook(_reorder)
    module.output_order = order  # type: ignore[assignment]


def stop_reordering(module: nn.Module) -> None:
    """Undo `reorder_outputs` for everything inside `module`."""
    for part in module.modules():
        if hasattr(part, "output_order"):
            part.output_order = None  # type: ignore[assignment]


def attach_orders(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """`reorder_outputs` for modules by their paths, with orders as they are stored.

    Raises CheckpointError for a module that the model does not have, or for what is no order of channels.
    """
    known = dict(model.named_modules())
    for path, order in orders.items():
        if path not in known:
            raise CheckpointError(f"the checkpoint reorders the output of {path}, which this model does not have")
        places = order.to(torch.int64)
        if not torch.equal(places.sort().values, torch.arange(len(places), device=places.device)):
            raise CheckpointError(f"the order of the channels that {path} writes is damaged: not each comes once")
        reorder_outputs(known[path], places)


def _reorder(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    order: Any = module.output_order
    if order is None:
        return None
    if order.device != output.device:
        module.output_order = order = order.to(output.device)
    return output[..., order]
