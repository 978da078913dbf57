"""Which matrices of a block read the same input, and in which order the block needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bitgrain.models.stream import Call, call_block
from bitgrain.runtime.watch import Key, Watch, parameters_of


@dataclass(frozen=True)
class Stage:
    """Parameters of a block (names relative to it) whose inputs are known once all earlier stages have run.

    names     in the order of use; shared: all read one and the same tensor
    writers   those whose output is added to the residual stream as it is
    reached   False: calibration never uses them
    """

    names: tuple[str, ...]
    shared: bool
    writers: frozenset[str]
    reached: bool = True


def find_stages(block: nn.Module, names: Sequence[str], hidden: Tensor, call: Call) -> list[Stage]:
    """The stages of a real block for the parameters `names`, from running it on one batch."""
    inputs: list[Tensor] = []  # kept alive: an address is compared
    members: list[list[str]] = []
    stage_of: dict[str, int] = {}
    written: list[str] = []
    experts: set[str] = set()

    def product(key: Key, x: Tensor) -> None:
        if key.expert is not None:
            experts.add(key.name)
        if key.name in stage_of:
            return
        for i, known in enumerate(inputs):
            if known.data_ptr() == x.data_ptr() and known.numel() == x.numel():
                stage_of[key.name] = i
                members[i].append(key.name)
                return
        stage_of[key.name] = len(inputs)
        inputs.append(x)
        members.append([key.name])

    def total(key: Key, _: Tensor) -> None:
        if key.expert is None:
            written.append(key.name)

    with Watch(parameters_of(block, names), product, total):
        call_block(block, hidden, call)
    # an expert of a list of modules that this batch did not choose goes where its like are
    for name in names:
        if name not in stage_of:
            like = next((other for other in stage_of if _leaf(other) == _leaf(name)), None)
            if like is not None:
                members[stage_of[like]].append(name)
                stage_of[name] = stage_of[like]
    alone = [name for name in names if name not in stage_of]
    stages = [
        Stage(
            tuple(group),
            shared=not experts.intersection(group) and not _listed(group),
            writers=frozenset(name for name in group if written.count(name) == 1),
        )
        for group in members
    ]
    return [*stages, *([Stage(tuple(alone), False, frozenset(), reached=False)] if alone else [])]


def _leaf(name: str) -> str:
    """ "down_proj" of "mlp.experts.3.down_proj.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _listed(group: Sequence[str]) -> bool:
    """Whether some were put there by their name only, as their like."""
    leaves = [_leaf(name) for name in group]
    return len(set(leaves)) < len(leaves)
