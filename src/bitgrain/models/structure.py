"""What each parameter in memory is: linear, stack of experts, router, embedding, head or convolution.

Read off the module tree (classes of torch, shapes, and who sits next to whom), never off a list of models.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import ModelError
from bitgrain.runtime.convolutions import CONVOLUTIONS

Role = Literal["linear", "expert", "router", "embedding", "lm_head", "conv"]


@dataclass(frozen=True)
class Matrix:
    """A parameter in memory that is a matrix, or `experts` matrices stacked along its first dimension.

    `transposed`: each matrix is [in, out] instead of [out, in]; a convolution's weight [in, out/groups, *kernel].
    """

    name: str
    module: str
    class_name: str
    role: Role
    transposed: bool = False
    experts: int = 1


def find_matrices(skeleton: nn.Module) -> dict[str, Matrix]:
    """Every matrix among the parameters of `skeleton`, by dotted name.

    Raises ModelError where rows and columns of a stack of experts cannot be told apart.
    """
    found: dict[str, Matrix] = {}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}" if path else leaf
            kind = _kind(module, leaf, parameter, skeleton)
            if kind is not None:
                role, transposed = kind
                experts = parameter.shape[0] if role == "expert" else 1
                found[name] = Matrix(name, path, type(module).__name__, role, transposed, experts)
    _mark_expert_lists(skeleton, found)
    for name in _router_weights(skeleton, found):
        owner, _, _ = name.rpartition(".")
        class_name = type(skeleton.get_submodule(owner)).__name__
        old = found.get(name, Matrix(name, owner, class_name, "router"))
        found[name] = replace(old, role="router")
    for name in _head_weights(skeleton):
        if name in found:
            found[name] = replace(found[name], role="lm_head")
    return found


def _kind(module: nn.Module, leaf: str, parameter: torch.Tensor, root: nn.Module) -> tuple[Role, bool] | None:
    if not parameter.is_floating_point():
        return None
    if isinstance(module, CONVOLUTIONS):
        return ("conv", bool(module.transposed)) if leaf == "weight" else None
    if isinstance(module, nn.Embedding):
        return ("embedding", False) if leaf == "weight" else None
    if parameter.ndim == 2 and leaf == "weight":
        if isinstance(module, nn.Linear):
            return "linear", False
        if isinstance(module, Conv1D):
            return "linear", True
        declared = _declared_features(module)
        if declared is not None and declared == tuple(parameter.shape):
            return "linear", False  # a linear of the checkpoint's own code
    if parameter.ndim == 3 and holds_experts(module, parameter.shape[0]):
        return "expert", _is_transposed(module, leaf, parameter, root)
    return None


def _declared_features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) where a module says so in attributes, as torch's Linear does."""
    for out, into in (("out_features", "in_features"), ("output_size", "input_size")):
        pair = getattr(module, out, None), getattr(module, into, None)
        if all(isinstance(size, int) for size in pair):
            return cast(tuple[int, int], pair)
    return None


def holds_experts(module: nn.Module, count: int) -> bool:
    """Whether the 3-D parameters of `module` are `count` experts: transformers marks it, or it has that count."""
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return True
    return any("expert" in name and isinstance(value, int) and value == count for name, value in vars(module).items())


# A projection back to the hidden size. A hint, used only where shapes alone do not tell.
_DOWN = re.compile(r"down|w2|fc2|output|out_proj")


def _is_transposed(module: nn.Module, leaf: str, parameter: torch.Tensor, root: nn.Module) -> bool:
    """Whether the experts in `parameter` are stored [in, out]."""
    marked = getattr(module, "is_transposed", None)
    if isinstance(marked, bool):
        return marked
    _, rows, columns = parameter.shape
    declared = _declared_features(module)
    if declared is not None and rows != columns and sorted(declared) == sorted((rows, columns)):
        return declared == (columns, rows)
    # [experts, 2 x ffn, hidden] and [experts, hidden, ffn], or both the other way: one is twice as wide
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    first = [shape for name, shape in shapes.items() if not _DOWN.search(name)]
    second = [shape for name, shape in shapes.items() if _DOWN.search(name)]
    if len(first) == 1 and len(second) == 1:
        (_, a, b), (_, c, d) = first[0], second[0]
        if (a == 2 * d and b == c) != (a == d and b == 2 * c):
            return a == d and b == 2 * c
    hidden = _hidden_size(module, root)
    if (rows == hidden) != (columns == hidden):
        reads_hidden = not _DOWN.search(leaf)
        return (rows == hidden) == reads_hidden
    if (transposed := _transposed_in_source(module, leaf)) is not None:
        return transposed
    raise ModelError(
        f"the experts in {type(module).__name__}.{leaf} have shape {list(parameter.shape)}: "
        "it cannot be told whether they are stored [in, out] or [out, in]"
    )


def _transposed_in_source(module: nn.Module, leaf: str) -> bool | None:
    """How forward multiplies by a square parameter: linear(x, W) reads [out, in], x @ W reads [in, out]."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return None
    lines = [line for line in source.splitlines() if re.search(rf"\bself\.{leaf}\b", line)]
    if any("linear(" in line for line in lines):
        return False
    products = [line for line in lines if re.search(r"bmm\(|matmul\(|@", line)]
    if products and not any(re.search(r"transpose\(|\.mT\b|\.T\b|\.t\(", line) for line in products):
        return True
    return None


def _hidden_size(module: nn.Module, root: nn.Module) -> int | None:
    for name in ("hidden_size", "hidden_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    config: Any = getattr(module, "config", None) or getattr(root, "config", None)
    if config is None:
        return None
    return getattr(config.get_text_config(), "hidden_size", None)


def _mark_expert_lists(skeleton: nn.Module, found: dict[str, Matrix]) -> None:
    """Linears inside a ModuleList of experts (one module each) are experts."""
    for path, _, _ in _expert_containers(skeleton, found):
        for name, matrix in found.items():
            if matrix.role == "linear" and name.startswith(f"{path}."):
                found[name] = replace(matrix, role="expert")


def _expert_containers(skeleton: nn.Module, found: dict[str, Matrix]) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, number of experts) of each stack or list of experts."""
    for path, module in skeleton.named_modules():
        stacked = {
            found[name].experts
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and (name := f"{path}.{leaf}") in found and found[name].role == "expert"
        }
        if stacked:
            yield path, module, stacked.pop()
        elif _is_expert_list(path, module):
            yield path, module, sum(1 for _ in module.children())


def _is_expert_list(path: str, module: nn.Module) -> bool:
    """Several children of one class under the name `experts`: nothing but the name tells them from layers."""
    children = list(module.children())
    leaf = path.rpartition(".")[2]
    return (
        isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and "expert" in leaf
        and len({type(child) for child in children}) == 1
        and not isinstance(children[0], nn.ModuleList)
    )


_ROUTER = re.compile(r"router|(^|_)gate$", re.IGNORECASE)


def _router_weights(skeleton: nn.Module, found: dict[str, Matrix]) -> set[str]:
    """The matrices that choose experts: beside a container of experts, with one output for each of them.
    Also the gates of shared experts: beside it, with one output."""
    routers: set[str] = set()
    for path, container, count in _expert_containers(skeleton, found):
        parent_path, _, leaf = path.rpartition(".")
        parent = skeleton.get_submodule(parent_path)
        for name, child in parent.named_children():
            if child is container or name == leaf:
                continue
            prefix = f"{parent_path}.{name}" if parent_path else name
            weights = _matrices_under(prefix, child)
            outputs = {rows for rows, _ in weights.values()}
            hinted = bool(_ROUTER.search(name) or _ROUTER.search(type(child).__name__))
            one_output = outputs == {1} and isinstance(child, nn.Linear)
            # more outputs than experts: identity ("zero") experts have no weights
            if outputs and (outputs == {count} or one_output or (hinted and min(outputs) >= count)):
                routers |= weights.keys()
    return {name for name in routers if name not in found or found[name].role == "linear"}


def _matrices_under(prefix: str, module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of what could be a matrix; a bias of shape [1, experts] is none."""
    return {
        f"{prefix}.{leaf}": (parameter.shape[0], parameter.shape[1])
        for leaf, parameter in module.named_parameters()
        if parameter.ndim == 2 and parameter.is_floating_point() and not leaf.endswith("bias")
    }


def _head_weights(skeleton: nn.Module) -> Iterator[str]:
    model = cast(PreTrainedModel, skeleton)
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return
    if isinstance(head, nn.Module):
        for path, module in model.named_modules():
            if module is head:
                yield f"{path}.weight"
