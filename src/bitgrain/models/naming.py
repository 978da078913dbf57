"""From names on disk to names in memory.

transformers renames, splits, stacks and transposes tensors while it loads them (`core_model_loading`). Its
own rules are run here on tensors of the meta device, so what they do to names and shapes is known before any
weight is read, for every architecture, and without a table of ours.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from bitgrain.errors import ModelError


class StoredTensor(Protocol):
    """A tensor in a file, known by its header."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Route:
    """What becomes of one tensor on disk.

    `targets`: the names in memory that it fills, wholly or in part; empty when the model does not know it.
    `flipped`: its rows become columns on the way.
    `index`: its place among the tensors of its kind that are stacked into one parameter (the expert number).
    `mates`: the tensors on disk, itself included, that are joined with it into one matrix.
    """

    targets: tuple[str, ...]
    flipped: bool = False
    index: int | None = None
    mates: tuple[str, ...] = ()


def natural_order(names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Names sorted with their numbers as numbers, in transformers' own order (experts are stacked in it)."""
    return sorted(names, key=dot_natural_key)


def trace_routes(skeleton: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, Route]:
    """Disk name -> Route for every tensor in `stored`, in natural order.

    Raises ModelError when a shape does not fit the model.
    """
    rules = _Rules(skeleton)
    routes: dict[str, Route] = {name: Route(()) for name in natural_order(stored)}
    plain, collected = rules.sort(routes)
    for name, target in plain.items():
        _check_shape(name, stored[name].shape, target, rules.memory[target])
        routes[name] = Route((target,))
    for target, sources in collected.items():
        converter = rules.converter(sources)
        routes |= _run_converter(converter, target, sources, stored, rules.memory, rules.model)
    return routes


def convert_tensors(skeleton: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under their names on disk -> the parameters and buffers that they fill, by their names in memory.

    Of tensors that transformers joins into one parameter, all must be given. Names unknown to the model are left out.
    """
    rules = _Rules(skeleton)
    plain, collected = rules.sort(natural_order(tensors))
    found = {target: tensors[name] for name, target in plain.items()}
    for target, sources in collected.items():
        converter = rules.converter(sources)
        for pattern, names in sources.items():
            for name in names:
                converter.add_tensor(target, name, pattern, tensors[name])  # pyright: ignore[reportArgumentType]
        result: dict[str, Any] = converter.convert(target, model=rules.model, config=rules.model.config)
        for name, value in result.items():
            if name in rules.memory:
                found[name] = value[0] if isinstance(value, list) else value
    return found


def revert_tensors(
    skeleton: nn.Module, tensors: Mapping[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The inverse of `convert_tensors`: parameters and buffers by their names in memory -> tensors by those on disk.

    names  on disk, of the tensors that are wanted. What is only renamed comes back exactly; whether the rest does is
           the caller's to check, transformers does not promise it for every architecture.
    """
    rules = _Rules(skeleton)
    plain, _ = rules.sort(names)
    found = {name: tensors[target] for name, target in plain.items() if target in tensors}
    renamed = set(plain.values())
    converted = {target: tensor for target, tensor in tensors.items() if target not in renamed}
    model = cast(Any, skeleton)
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    try:
        return found | (revert_weight_conversion(model, converted) if converted else {})
    finally:
        model._weight_conversions = before


class _Rules:
    """transformers' own rules for one model."""

    def __init__(self, skeleton: nn.Module) -> None:
        self.model = cast(PreTrainedModel, skeleton)
        self.memory: dict[str, torch.Tensor] = self.model.state_dict()
        rules = get_model_conversion_mapping(self.model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._converter_of = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def sort(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
        """Names that are only renamed, with their targets; and those that are converted: target -> pattern -> names."""
        plain: dict[str, str] = {}
        collected: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        prefix = self.model.base_model_prefix
        for name in names:
            target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.memory)
            if target not in self.memory and name in self.memory:
                target, pattern = rename_source_key(name, [], [], prefix, self.memory)
            if target not in self.memory:
                continue
            if pattern is None:
                plain[name] = target
            else:
                collected[target][pattern].append(name)
        return plain, collected

    def converter(self, sources: Mapping[str, Sequence[str]]) -> WeightConverter:
        """A fresh converter for names of these patterns."""
        return copy.deepcopy(self._converter_of[next(iter(sources))])


def _run_converter(
    converter: WeightConverter,
    target: str,
    sources: dict[str, list[str]],
    stored: Mapping[str, StoredTensor],
    memory: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
) -> dict[str, Route]:
    flipped = _is_flipped(converter, target, sources, stored, memory)
    for pattern, names in sources.items():
        for name in names:
            meta = torch.empty(stored[name].shape, device="meta")
            converter.add_tensor(target, name, pattern, meta)  # pyright: ignore[reportArgumentType]
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    try:
        result = converter.convert(target, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        names = [name for group in sources.values() for name in group]
        raise ModelError(
            f"{_listed(names)} cannot be turned into {target} ({operations}): {error}. "
            "The checkpoint is incomplete, or does not fit its config.json"
        ) from error
    targets = tuple(name for name in result if name in memory)
    for name in targets:
        value: Any = result[name]
        _check_shape(operations, (value[0] if isinstance(value, list) else value).shape, name, memory[name])

    stacked = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
    joined = len(sources) > 1
    routes = {}
    for names in sources.values():
        for index, name in enumerate(names):
            mates = tuple(group[index] for group in sources.values() if index < len(group)) if joined else ()
            routes[name] = Route(targets, flipped, index if stacked and len(targets) == 1 else None, mates)
    return routes


def _is_flipped(
    converter: WeightConverter,
    target: str,
    sources: dict[str, list[str]],
    stored: Mapping[str, StoredTensor],
    memory: Mapping[str, torch.Tensor],
) -> bool:
    """Whether the last two dimensions trade places; all other operations keep rows rows."""
    shape = stored[next(iter(sources.values()))[0]].shape
    dimensions, flipped = len(shape), False
    for operation in converter.operations:
        if isinstance(operation, MergeModulelist):
            dimensions += 1
        elif isinstance(operation, Transpose):
            swapped = {operation.dim0 % dimensions, operation.dim1 % dimensions}
            needed = not operation.check_dims or tuple(shape) != tuple(memory[target].shape)
            if needed and swapped == {dimensions - 2, dimensions - 1}:
                flipped = not flipped
    return flipped


def _check_shape(what: str, shape: Sequence[int], target: str, parameter: torch.Tensor) -> None:
    if tuple(shape) != tuple(parameter.shape):
        raise ModelError(
            f"{what} gives shape {list(shape)} for {target}, where the model has {list(parameter.shape)}: "
            "the weights do not fit config.json"
        )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
