"""Where quantized weights of a model run packed: layers, embeddings with the heads tied to them, stacked experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.models.anatomy import Anatomy, Weight
from bitgrain.models.naming import convert_tensors
from bitgrain.models.structure import Matrix, find_matrices

Kind = Literal["linear", "embedding", "tied", "experts"]


@dataclass(frozen=True)
class Place:
    """A parameter whose packed form runs in its place.

    kind     "tied": an embedding, and a head that multiplies by the same rows
    target   its path
    parts    experts: of each, the matrices that lie one above the other, as (tensor, which of its stack); else one
    paths    embeddings and heads: all modules that share it
    transposed   experts: it is [experts, in, out]
    """

    kind: Kind
    target: str
    parts: tuple[tuple[tuple[str, int], ...], ...]
    paths: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of."""
        return tuple(dict.fromkeys(name for expert in self.parts for name, _ in expert))

    @property
    def module(self) -> str:
        """The path of the module that owns the parameter."""
        return self.target.rpartition(".")[0]


def find_places(
    skeleton: nn.Module, anatomy: Anatomy, layers: Mapping[str, StoredLayer]
) -> tuple[list[Place], dict[str, str]]:
    """The places of quantized tensors, and for each tensor without one (by name) why it has none."""
    tied = {name: group for group in anatomy.tied for name in group}
    places: list[Place] = []
    reasons: dict[str, str] = {}
    stacks: dict[str, list[Weight]] = defaultdict(list)
    for weight in anatomy.weights:
        if weight.tensor not in layers:
            continue
        module = skeleton.get_submodule(weight.memory_module)
        whole = weight.targets == (weight.memory,)
        if weight.role == "conv":
            reasons[weight.tensor] = "a convolution"
        elif whole and skeleton.get_parameter(weight.memory).ndim == 3:
            stacks[weight.memory].append(weight)
        elif not whole or weight.memory != f"{weight.memory_module}.weight":
            reasons[weight.tensor] = f"{weight.class_name}, whose weight is joined to others or split"
        else:
            names = tied.get(weight.memory, (weight.memory,))
            found = place_of(skeleton, weight.tensor, module, names)
            if isinstance(found, str):
                reasons[weight.tensor] = found
            else:
                places.append(found)
    matrices = find_matrices(skeleton) if stacks else {}
    for target, weights in stacks.items():
        transposed = matrices[target].transposed
        parts = _expert_parts(skeleton, target, weights, transposed)
        if isinstance(parts, str):
            reasons |= {weight.tensor: parts for weight in weights}
        else:
            places.append(Place("experts", target, parts, transposed=transposed))
    return places, reasons


def place_of(model: nn.Module, tensor: str, owner: nn.Module, names: Sequence[str]) -> Place | str:
    """The place of the weight of `owner`, which the parameters `names` are; or why it has none."""
    paths = tuple(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    modules = [model.get_submodule(path) for path in paths]
    parts = (((tensor, 0),),)
    if len(names) == 1 and type(owner) in (nn.Linear, Conv1D):
        return Place("linear", names[0], parts)
    embeddings = {id(one) for one in modules if isinstance(one, nn.Embedding)}
    heads = {id(one) for one in modules if type(one) is nn.Linear}
    if not embeddings or len(heads) > 1 or len(embeddings | heads) < len({id(one) for one in modules}):
        shared = ", which several layers share" if len(names) > 1 else ""
        return f"a weight of {type(owner).__name__}{shared}"
    return Place("tied" if heads else "embedding", names[0], parts, paths)


def stack_of(tensor: str, matrix: Matrix) -> Place:
    """The place of a parameter in memory that is a stack of experts."""
    return Place(
        "experts", matrix.name, tuple(((tensor, i),) for i in range(matrix.experts)), transposed=matrix.transposed
    )


def _expert_parts(
    skeleton: nn.Module, target: str, weights: Sequence[Weight], transposed: bool
) -> tuple[tuple[tuple[str, int], ...], ...] | str:
    """Which matrices on disk each expert of a parameter is made of: transformers joins columns of row numbers."""
    numbers: dict[str, Tensor] = {}
    blocks: dict[int, tuple[str, int, int]] = {}  # first number -> tensor, which of its stack, rows
    count = 0
    for weight in weights:
        rows = weight.out_features
        for i in range(weight.experts):
            blocks[count + i * rows] = (weight.tensor, i, rows)
        column = torch.arange(count, count + weight.experts * rows).view(weight.experts, rows)
        column = column.unsqueeze(1 if weight.transposed else 2)
        numbers[weight.tensor] = column if weight.expert is None else column[0]
        count += weight.experts * rows
    try:
        joined = convert_tensors(skeleton, numbers).get(target)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError):
        joined = None
    experts, rows, columns = skeleton.get_parameter(target).shape
    shape = (experts, 1, columns) if transposed else (experts, rows, 1)
    if joined is None or tuple(joined.shape) != shape:
        return "experts that are stacked in a way of their own, or in part"
    found: list[tuple[tuple[str, int], ...]] = []
    for one in joined.flatten(1):
        parts: list[tuple[str, int]] = []
        at = 0
        while at < len(one):
            first = int(one[at])
            name, i, rows = blocks.get(first, ("", 0, 0))
            if not rows or not one[at : at + rows].equal(torch.arange(first, first + rows)):
                return "experts whose rows are stored in another order"
            parts.append((name, i))
            at += rows
        found.append(tuple(parts))
    return tuple(found)
