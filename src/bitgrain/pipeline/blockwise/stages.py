"""Which matrices of a block read the same input, in which order, and which write into the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from bitgrain.models.stream import Call, call_block
from bitgrain.runtime.watch import Key, Watch, parameters_of

BLOCK_INPUT = ""
"""As the source of a residual: the hidden states that enter the block."""


@dataclass(frozen=True)
class Stage:
    """Parameters of a block (names relative to it) whose inputs are known once all earlier stages have run.

    names     in the order of use
    shared    all read one and the same tensor (else they are experts, each with its own tokens)
    residual  those whose output is added, as it is, to the residual stream -> where that comes from: `BLOCK_INPUT`, or
              the parameter whose sum with it was the last
    reached   False: calibration never uses them
    """

    names: tuple[str, ...]
    shared: bool
    residual: Mapping[str, str] = field(default_factory=dict)
    reached: bool = True


def find_stages(block: nn.Module, names: Sequence[str], hidden: Tensor, call: Call) -> list[Stage]:
    """The stages of a real block for the parameters `names`, from running it on one batch."""
    inputs: list[Tensor] = []  # kept alive: an address is compared
    members: list[list[str]] = []
    known: dict[str, int] = {}
    experts: set[str] = set()
    streams: list[tuple[str, Tensor]] = [(BLOCK_INPUT, hidden)]
    residual: dict[str, str] = {}

    parameters = parameters_of(block, names)

    def product(key: Key, x: Tensor) -> None:
        if key.expert is not None or parameters[key.name].ndim > 2:
            experts.add(key.name)
        if key.name in known:
            return
        place = next((i for i, one in enumerate(inputs) if _same(one, x)), len(inputs))
        if place == len(inputs):
            inputs.append(x)
            members.append([])
        members[place].append(key.name)
        known[key.name] = place

    def total(key: Key, other: Tensor, result: Tensor) -> None:
        source = next((name for name, stream in streams if _same(stream, other)), None)
        if source is not None and key.expert is None:
            residual[key.name] = source
            streams.append((key.name, result))

    with Watch(parameters, product, total):
        call_block(block, hidden, call)
    # an expert of a list of modules that this batch did not choose goes where its like are
    for name in names:
        like = next((other for other in known if leaf_of(other) == leaf_of(name)), None)
        if name not in known and like is not None:
            members[known[like]].append(name)
    stages = [
        Stage(
            tuple(group),
            shared=not experts.intersection(group) and len({leaf_of(name) for name in group}) == len(group),
            residual={name: residual[name] for name in group if name in residual},
        )
        for group in members
    ]
    placed = {name for group in members for name in group}
    alone = tuple(name for name in names if name not in placed)
    return [*stages, *([Stage(alone, False, reached=False)] if alone else [])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def leaf_of(name: str) -> str:
    """ "down_proj" of "mlp.experts.3.down_proj.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]
