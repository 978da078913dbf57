"""A model's anatomy: what every tensor of a checkpoint is, by its name on disk."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from bitgrain.errors import ModelError
from bitgrain.models.blocks import block_index, find_blocks
from bitgrain.models.fused import group_id, sibling_groups
from bitgrain.models.naming import Route, StoredTensor, trace_routes
from bitgrain.models.structure import Matrix, Role, find_matrices


@dataclass(frozen=True)
class Weight:
    """One tensor on disk that is a matrix, or a stack of matrices.

    tensor: name on disk; module: the same without ".weight".
    memory: the parameter that it goes into (where it is split into several, the first: `targets` has all);
    memory_module: the module that owns it, of class `class_name`.
    out_features, in_features: of one matrix. An embedding has a row for each token: out_features counts them.
    transposed: stored [in, out]. experts: matrices stacked in this tensor, 1 unless it is 3-D.
    expert: its place in the stack in memory, where each expert has its own tensor on disk; else None.
    block: index into `Anatomy.block_names`; None outside the blocks.
    place: of its parameter among those of the model in memory.
    fused: id of the group that must share a scheme, as engines join its members; None for no group.
    """

    tensor: str
    module: str
    memory: str
    memory_module: str
    class_name: str
    role: Role
    out_features: int
    in_features: int
    transposed: bool
    experts: int
    block: int | None
    fused: str | None
    expert: int | None = None
    targets: tuple[str, ...] = ()
    place: int = 0

    @property
    def elements(self) -> int:
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements on disk. `total` is the sum of the roles and `other` (norms, biases, buffers);
    `unexpected` (tensors that the model does not know) and `in_blocks` (a part of total) stand beside it."""

    total: int
    linear: int
    expert: int
    router: int
    embedding: int
    lm_head: int
    conv: int
    other: int
    unexpected: int
    in_blocks: int


@dataclass(frozen=True)
class Anatomy:
    """What a checkpoint holds. Every tensor on disk is in exactly one of weights, others and unexpected.

    block_names: paths in memory of the blocks, in order, all stacks. tied: names in memory that share one
    tensor on disk. missing: parameters that no tensor fills. unexpected: tensors that the model
    does not know. sizes: number of elements of each tensor on disk. memory_of: tensors that fill one parameter
    or buffer -> its name.
    """

    architecture: str
    block_names: tuple[str, ...]
    weights: tuple[Weight, ...]
    others: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    block_of: Mapping[str, int | None]
    sizes: Mapping[str, int]
    memory_of: Mapping[str, str]

    @property
    def parameters(self) -> Parameters:
        count = Counter[str]()
        for weight in self.weights:
            count[weight.role] += self.sizes[weight.tensor]
        count["other"] = sum(self.sizes[name] for name in self.others)
        total = count.total()
        known = [*(weight.tensor for weight in self.weights), *self.others]
        return Parameters(
            total=total,
            linear=count["linear"],
            expert=count["expert"],
            router=count["router"],
            embedding=count["embedding"],
            lm_head=count["lm_head"],
            conv=count["conv"],
            other=count["other"],
            unexpected=sum(self.sizes[name] for name in self.unexpected),
            in_blocks=sum(self.sizes[name] for name in known if self.block_of[name] is not None),
        )


def read_anatomy(skeleton: nn.Module, stored: Mapping[str, StoredTensor]) -> Anatomy:
    """Match the tensors on disk with the model they are for.

    `skeleton`: from `build_skeleton`. `stored`: name on disk -> shape and dtype, from the files' headers.
    Raises ModelError when a shape does not fit the model, or when a stack of experts cannot be read.
    """
    matrices = find_matrices(skeleton)
    place_of = {name: place for place, name in enumerate(matrices)}
    blocks = find_blocks(skeleton, matrices)
    index_of = {path: index for index, path in enumerate(blocks)}
    routes = trace_routes(skeleton, stored)

    weights: list[Weight] = []
    others: list[str] = []
    unexpected: list[str] = []
    block_of: dict[str, int | None] = {}
    for name, route in routes.items():
        block_of[name] = block_index(route.targets[0], index_of) if route.targets else None
        matrix = next((matrices[target] for target in route.targets if target in matrices), None)
        shape = tuple(stored[name].shape)
        if not route.targets:
            unexpected.append(name)
        elif matrix is None or len(shape) < 2 or not stored[name].dtype.is_floating_point:
            others.append(name)
        else:
            weight = _weight(name, shape, route, matrix, block_of[name])
            weights.append(replace(weight, place=place_of[matrix.name]))

    tied = _tied_groups(skeleton, {target for route in routes.values() for target in route.targets})
    return Anatomy(
        architecture=type(skeleton).__name__,
        block_names=blocks,
        weights=tuple(_with_groups(weights, routes)),
        others=tuple(others),
        tied=tied,
        missing=_missing(skeleton, routes, tied),
        unexpected=tuple(unexpected),
        block_of=block_of,
        sizes={name: prod(stored[name].shape) for name in routes},
        memory_of={name: route.targets[0] for name, route in routes.items() if len(route.targets) == 1},
    )


def _weight(name: str, shape: Sequence[int], route: Route, matrix: Matrix, block: int | None) -> Weight:
    role, transposed, experts = matrix.role, matrix.transposed != route.flipped, 1
    if role == "conv" or len(shape) > 3:
        role, transposed, rows, columns = "conv", matrix.transposed, shape[0], prod(shape[1:])
    elif len(shape) == 3:
        experts, rows, columns = shape
        if role != "expert":
            raise ModelError(f"{name} has shape {list(shape)}, but goes into the {role} {matrix.name}")
    else:
        rows, columns = shape
    return Weight(
        tensor=name,
        module=name.removesuffix(".weight"),
        memory=matrix.name,
        memory_module=matrix.module,
        class_name=matrix.class_name,
        role=role,
        out_features=columns if transposed else rows,
        in_features=rows if transposed else columns,
        transposed=transposed,
        experts=experts,
        block=block,
        fused=None,
        expert=route.index if role == "expert" else None,
        targets=route.targets,
    )


def _with_groups(weights: list[Weight], routes: Mapping[str, Route]) -> list[Weight]:
    """The same weights, with `fused` filled in."""
    by_tensor = {weight.tensor: weight for weight in weights}
    groups = {mates for weight in weights if len(mates := routes[weight.tensor].mates) > 1}
    fusable = [weight for weight in weights if weight.role in ("linear", "expert")]
    alone = [weight for weight in fusable if len(routes[weight.tensor].mates) < 2]
    siblings = sibling_groups((weight.tensor, _memory_leaf(weight), weight.in_features) for weight in alone)
    fused: dict[str, str] = {}
    for group in [*groups, *siblings]:
        modules = [by_tensor[tensor].module for tensor in group]
        fused |= dict.fromkeys(group, group_id(modules))
    return [replace(weight, fused=fused.get(weight.tensor)) for weight in weights]


def _memory_leaf(weight: Weight) -> str:
    """The path whose last part says what the matrix is for: the module's, or the bare parameter's."""
    leaf = weight.memory.rpartition(".")[2]
    return weight.memory_module if leaf == "weight" else weight.memory


def _tied_groups(skeleton: nn.Module, filled: set[str]) -> tuple[tuple[str, ...], ...]:
    """Groups with one tensor on disk. Where several members have their own, transformers ties only equal ones."""
    model = cast(PreTrainedModel, skeleton)
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    group_of: dict[str, set[str]] = {}
    pairs = [(names[0], name) for names in same.values() for name in names[1:]]
    for target, origin in [*model.all_tied_weights_keys.items(), *pairs]:
        merged = group_of.get(target, {target}) | group_of.get(origin, {origin})
        group_of |= dict.fromkeys(merged, merged)
    groups = {tuple(sorted(group)) for group in group_of.values()}
    return tuple(sorted(group for group in groups if len(filled.intersection(group)) < 2))


def _missing(skeleton: nn.Module, routes: Mapping[str, Route], tied: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    model = cast(PreTrainedModel, skeleton)
    filled = {target for route in routes.values() for target in route.targets}
    filled |= {name for group in tied if filled.intersection(group) for name in group}
    ignored = model._keys_to_ignore_on_load_missing  # pyright: ignore[reportPrivateUsage]
    optional = [re.compile(pattern) for pattern in ignored or ()]
    return tuple(
        name
        for name in model.state_dict()
        if name not in filled and not any(pattern.search(name) for pattern in optional)
    )
