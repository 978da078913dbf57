"""What each way of storing an embedding would cost: its rows are looked up, so their errors enter as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Weight
from bitgrain.models.stream import StreamedModel
from bitgrain.numerics import QuantSpec
from bitgrain.pipeline.blockwise.batches import single_threaded
from bitgrain.solvers.rtn import RoundToNearest


class _Lookups(TorchFunctionMode):
    """While entered, notes which rows of some embeddings are looked up, and makes the results leaves of the graph."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {table.untyped_storage().data_ptr(): name for name, table in tables.items()}
        self.found: list[tuple[str, Tensor, Tensor]] = []
        """Name, row numbers [..], rows [.., width]."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.embedding and len(args) > 1:
            name = self._names.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                result = result.detach().requires_grad_(True)
                self.found.append((name, args[0].detach(), result))
        return result


def embedding_costs(
    stream: StreamedModel,
    ids: Sequence[Tensor],
    flowing: Sequence[Tensor],
    weights: Sequence[Weight],
    layers: Mapping[str, StoredLayer],
    candidates: Callable[[StoredLayer], Sequence[QuantSpec]],
) -> dict[str, list[float]]:
    """1/2 E[(g . dE)^2] for the rows that the text looks up, nats per token, by original tensor name.

    flowing  batch by batch, the gradients [batch, tokens, hidden] by what enters the first block
    An empty list for a table of which nothing was looked up.
    """
    if not weights:
        return {}
    tables = {weight.tensor: stream.model.get_parameter(weight.memory) for weight in weights}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in tables}
    for one, gradient in zip(ids, flowing, strict=True):
        with single_threaded():
            lookups = _Lookups(tables)
            with lookups:
                entering = stream.entering(one)
            leaves = [rows for _, _, rows in lookups.found]
            if not leaves or not entering.requires_grad:
                continue
            back = torch.autograd.grad(entering, leaves, gradient, materialize_grads=True, allow_unused=True)
            for (name, places, _), g in zip(lookups.found, back, strict=True):
                seen[name].append((places.flatten(), g.flatten(0, -2)))
    tokens = sum(one.numel() for one in ids)
    return {
        name: _costs(table, seen[name], candidates(layers[name]), tokens, name) if seen[name] else []
        for name, table in tables.items()
    }


def _costs(
    table: Tensor, seen: Sequence[tuple[Tensor, Tensor]], specs: Sequence[QuantSpec], tokens: int, name: str
) -> list[float]:
    """`seen`: row numbers [n] and gradients [n, width]. Only rows that were looked up are rounded."""
    rows, places = torch.cat([numbers for numbers, _ in seen]).unique(return_inverse=True)
    gradients = torch.cat([g for _, g in seen])
    weight = table[rows]
    costs: list[float] = []
    for spec in specs:
        error = RoundToNearest().round(weight, spec, name=name).dequantize() - weight
        costs.append(0.5 * float((gradients * error[places]).sum(-1).square().sum()) / tokens)
    return costs
