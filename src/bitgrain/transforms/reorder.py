"""RPTQ (Yuan et al., arXiv 2304.01089): input channels with like ranges are put side by side, to share a scale.

Which channels: k-means on their (smallest, largest) over the calibration data. How they come to their places:

heads     v -> o: rows of v, and with them columns of o, within each head of v and all query heads that read it
rows      up -> down: rows of every matrix that writes what lies between, whatever the activation, and columns of down
norm      the norm writes its output in the new order (`runtime.channel_order`), columns of all its readers follow
in place  nothing may move: clusters are runs of neighbouring channels

Each is proved; the first three fall back to the last where the proof fails. The ranges themselves are found later, when
the layers before are quantized. To be the last of the transforms: it measures what the others leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitgrain.numerics.clusters import Clusters, cluster_channels, cluster_within, join_neighbours
from bitgrain.runtime.channel_order import reorder_outputs, stop_reordering
from bitgrain.runtime.watch import Watch, parameters_of
from bitgrain.transforms.base import BlockView, OutsideView, Pair, register_transform
from bitgrain.transforms.proof import TOLERANCE, difference, routes
from bitgrain.transforms.rescale import bias_of, matrix_of, reader_of, writer_rows

_IN_ORDER = 0.01
"""How far inputs may be from those expected in their order, relative to their spread: far below any wrong order. They
are looked at since the output may hardly depend on them."""


@register_transform("reorder")
@dataclass(frozen=True)
class Reorder:
    """For layers whose inputs have static scales in clusters; others are left alone, but for their columns where they
    read what is reordered."""

    whole_model: ClassVar[bool] = False

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Nothing: inputs outside the blocks are not clustered."""
        del view
        return {}

    @torch.no_grad()
    def apply(self, block: BlockView) -> dict[str, Any]:
        """Figures: how each reader's channels were moved, and `norms`: norm -> a reader with the order it writes."""
        work = _Work(block)
        how: dict[str, str] = {}
        norms: dict[str, str] = {}
        for pair, readers in work.groups():
            found = work.fold(pair, readers)
            how |= dict.fromkeys(readers, found)
            if found == "norm" and pair is not None:
                norms[pair.writer] = readers[0]
        return {"moved": how, "norms": norms, "difference": work.largest}


class _Work:
    """One block on its way."""

    def __init__(self, block: BlockView) -> None:
        self.block, self.module = block, block.module
        self.routed, self.largest = routes(block.module), 0.0
        self.wanted = {
            name: spec
            for name, (_, spec) in block.specs.items()
            if spec is not None and spec.clusters and name in block.low
        }
        self.output, self.inputs = self._run()

    def _run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's output, and what each of the wanted readers is given."""
        inputs: dict[str, Tensor] = {}
        with Watch(parameters_of(self.module, self.wanted), lambda key, x: inputs.update({key.name: x})):
            return self.block.run(0), inputs

    def groups(self) -> Iterator[tuple[Pair | None, list[str]]]:
        """Readers of one input that want clusters, with the pair that they belong to."""
        left = dict.fromkeys(self.wanted)
        for pair in self.block.pairs:
            readers = [name for name in pair.readers if name in left]
            for name in readers:
                del left[name]
            if readers:
                yield pair, readers
        for name in left:
            yield None, [name]

    def fold(self, pair: Pair | None, readers: list[str]) -> str:
        """Move the channels of one group as far as the block allows; how."""
        specs = [self.wanted[name] for name in readers]
        count = min(spec.clusters for spec in specs)
        low, high = self.block.low[readers[0]].float(), self.block.high[readers[0]].float()
        if all(spec.symmetric for spec in specs):
            high = torch.maximum(-low, high)
            low = -high
        if pair is not None and pair.kind == "norm":
            found = cluster_channels(low, high, count)
            norm = self.module.get_submodule(pair.writer)
            if self._proved(found, readers, pair, [], lambda: reorder_outputs(norm, found.order)):
                return "norm"
            stop_reordering(norm)
        elif pair is not None and pair.head:
            found = cluster_within(low, high, count, pair.head, pair.repeats)
            order = _of_writer(found.order, pair)
            names = [pair.writer, *([pair.bias] if pair.bias else [])]
            if self._proved(found, readers, pair, names, lambda: _move_rows(self.module, pair, order)):
                return "heads"
        else:
            found = cluster_channels(low, high, count)
            for writers in self._writers(readers[0], len(low)):
                biases = [bias for name in writers if (bias := bias_of(self.module, name))]
                if self._proved(
                    found, readers, pair, [*writers, *biases], lambda of=writers: self._move_chunks(of, found.order)
                ):
                    return "rows"
        self._note(Clusters(torch.arange(len(low)), join_neighbours(low, high, count)), readers)
        return "in place"

    def _proved(
        self, found: Clusters, readers: list[str], pair: Pair | None, writers: list[str], move: Callable[[], None]
    ) -> bool:
        """Move what is written and the columns of its readers; all as it was, and False, if the proof fails."""
        columns = list(pair.readers) if pair is not None else readers
        saved = {name: self.module.get_parameter(name).data.clone() for name in (*writers, *columns)}
        move()
        for name in columns:
            weight = matrix_of(self.module, name, self._transposed(name))
            weight.copy_(weight[..., found.order.to(weight.device)])
        output, inputs = self._run()
        moved = difference(self.output, output, self.routed)
        order = found.order.to(output.device)
        come = max(difference(self.inputs[name][..., order], inputs[name], self.routed) for name in readers)
        if moved <= TOLERANCE and come <= _IN_ORDER:
            self.largest = max(self.largest, moved)
            self._note(found, readers)
            return True
        for name, value in saved.items():
            self.module.get_parameter(name).data.copy_(value)
        return False

    def _note(self, found: Clusters, readers: list[str]) -> None:
        self.block.clusters.update(dict.fromkeys(readers, found))

    def _transposed(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, Conv1D) or any(name in pair.transposed for pair in self.block.pairs)

    def _writers(self, reader: str, width: int) -> Iterator[list[str]]:
        """Matrices that may together write the inputs of `reader`: those beside it, then those further off."""
        parts = reader.split(".")[:-2]
        tried: list[list[str]] = []
        while True:
            home = ".".join(parts)
            inside = [
                f"{path}.weight"
                for path, part in self.module.named_modules()
                if isinstance(part, nn.Linear | Conv1D) and (not home or path.startswith(f"{home}."))
            ]
            fitting = [name for name in inside if name != reader and self._rows(name) % width == 0]
            beside = [name for name in fitting if name.split(".")[:-2] == parts]
            for names in (beside, fitting):
                if names and names not in tried:
                    tried.append(names)
                    yield names
            if not parts:
                return
            parts = parts[:-1]

    def _rows(self, name: str) -> int:
        return matrix_of(self.module, name, self._transposed(name)).shape[-2]

    def _move_chunks(self, writers: Sequence[str], order: Tensor) -> None:
        """Each run of as many rows as there are channels (gate and up in one matrix have two), and of biases."""
        for name in writers:
            weight = matrix_of(self.module, name, self._transposed(name))
            places = torch.cat([order + start for start in range(0, len(weight), len(order))]).to(weight.device)
            weight.copy_(weight[places])
            if bias := bias_of(self.module, name):
                data = self.module.get_parameter(bias).data
                data.copy_(data[places])


def _of_writer(order: Tensor, pair: Pair) -> Tensor:
    """The order of the writer's channels [width] from that of the readers' columns [width x repeats]."""
    heads = order.view(-1, pair.repeats, pair.head)[:, 0]
    starts = torch.arange(len(heads)).unsqueeze(-1) * pair.head
    return (heads % pair.head + starts).flatten()


def _move_rows(module: nn.Module, pair: Pair, order: Tensor) -> None:
    weight = reader_of(module, pair, pair.writer)
    rows = writer_rows(pair, weight.device)
    weight[rows] = weight[rows[order.to(weight.device)]]
    if pair.bias:
        bias = module.get_parameter(pair.bias).data
        bias[rows] = bias[rows[order.to(bias.device)]]
