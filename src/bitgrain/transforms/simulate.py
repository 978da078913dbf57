"""A block as it would be with some matrices quantized, for as long as a search looks at it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.numerics import QuantSpec, fake_quantize
from bitgrain.transforms.base import BlockView, Pair
from bitgrain.transforms.rescale import reader_of, restoring


def can_simulate(block: BlockView, name: str) -> bool:
    """Whether `quantized` shows everything that quantizing this parameter would do."""
    return block.specs[name][1] is None or block.module.get_parameter(name).ndim == 2


@contextmanager
def quantized(
    module: nn.Module,
    pair: Pair,
    readers: Iterable[str],
    specs: Mapping[str, tuple[QuantSpec, QuantSpec | None]],
    columns: Tensor | None = None,
) -> Generator[None]:
    """Inside, `readers` hold rounded weights, and their modules see rounded inputs where the spec says so.

    columns  [in] or [experts, in]: the weights are multiplied by it before rounding and divided after it, as if the
             inputs were divided by it
    Inputs of stacks of experts are not rounded.
    """
    readers = list(readers)
    handles: list[Any] = []
    with restoring(module, readers), torch.no_grad():
        for name in readers:
            weight = reader_of(module, pair, name)
            weight_spec, input_spec = specs[name]
            scale = None if columns is None else columns.unsqueeze(-2)
            scaled = weight.clone() if scale is None else weight * scale
            rounded = _round(scaled.contiguous(), weight_spec)
            weight.copy_(rounded if scale is None else rounded / scale)
            owner, _, leaf = name.rpartition(".")
            if input_spec is not None:
                input_spec = replace(input_spec, clusters=0)  # none are known yet
            if input_spec is not None and leaf == "weight":
                handles.append(module.get_submodule(owner).register_forward_pre_hook(_rounding(input_spec, columns)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _round(weight: Tensor, spec: QuantSpec) -> Tensor:
    if weight.ndim == 2:
        return fake_quantize(weight, spec)
    return torch.stack([fake_quantize(one, spec) for one in weight])


def _rounding(spec: QuantSpec, columns: Tensor | None) -> Callable[..., tuple[Any, ...]]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if columns is None else args[0] / columns
        x = fake_quantize(x, spec)
        return (x if columns is None else x * columns, *args[1:])

    return before
