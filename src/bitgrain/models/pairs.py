"""Pairs of a writer and its readers whose scales may be exchanged, discovered in a real block and proved there.

No table of models: which matrix reads which norm is seen by running the block, and what a matrix writes for another is
found by trying. Names and shapes only order the tries. A pair is proved by rescaling it with random factors: the
block's output must stay as it was.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitgrain.models.heads import find_heads
from bitgrain.models.layouts import Layout, candidate_layouts
from bitgrain.models.structure import Matrix, find_matrices
from bitgrain.models.trace import NormCall, Trace, below, norm_paths, trace
from bitgrain.transforms.base import Pair
from bitgrain.transforms.proof import TOLERANCE, difference, routes
from bitgrain.transforms.rescale import bias_of, names_of, rescale, restoring, to_columns

Run = Callable[[], Tensor]


@torch.no_grad()
def find_pairs(block: nn.Module, run: Run, outside: Collection[str] = ()) -> tuple[Pair, ...]:
    """The pairs of one block, each proved: norm -> readers, v -> o with its heads, up -> down, those of experts too.

    block    with real float32 weights; they are changed while trying and have their old bits afterwards
    run      gives the block's output [tokens.., hidden] for one small batch (a hundred tokens of several sequences
             are enough); stacked experts must run one by one ("eager" in transformers)
    outside  paths in `block` that are left alone: with the paths of the blocks of a model, and a `run` in which each of
             them hands on its input, the final norm and its head are found
    A pair of an expert that was not reached by `run` is proved on the inputs of another expert of its list.
    """
    search = _Search(block, run, outside)
    return (*search.norm_pairs(), *search.linear_pairs(), *search.listed_experts())


class _Search:
    def __init__(self, block: nn.Module, run: Run, outside: Collection[str] = ()) -> None:
        self.block, self.run = block, run
        found = find_matrices(block)
        self.matrices = {
            name: matrix
            for name, matrix in found.items()
            if matrix.role not in ("embedding", "conv") and not below(name, outside)
        }
        self.trace = trace(block, run, self.matrices, norm_paths(block, outside))
        self.routed = routes(block)
        self.lists = _expert_lists(self.matrices, block)
        self.read_from_norm: set[str] = set()

    def norm_pairs(self) -> Iterator[Pair]:
        for call in self.trace.norms:
            readers = self._readers_of(call)
            self.read_from_norm |= set(readers)
            entry = gain_of(self.block.get_submodule(call.path), call)
            if entry is None or not readers:
                continue
            gain, offset, bias = entry
            pair = Pair(
                "norm",
                call.path,
                tuple(readers),
                call.y.shape[-1],
                gain=f"{call.path}.{gain}",
                offset=offset,
                bias=f"{call.path}.{bias}" if bias else "",
                transposed=self._transposed(readers),
            )
            if self._holds(pair):
                yield pair

    def linear_pairs(self) -> Iterator[Pair]:
        for readers in self._groups():
            if any(self.matrices[name].experts > 1 for name in readers):
                tries = self._stacked(readers[0])
            else:
                tries = self._plain(readers)
            for pair in tries:
                if self._holds(pair):
                    yield find_heads(self.block, pair, self.trace, self._again, self._same)
                    break

    def listed_experts(self) -> Iterator[Pair]:
        """Pairs inside experts that are a module each."""
        for path, members in self.lists.items():
            inputs = [
                (name.removeprefix(f"{path}.{key}."), x)
                for key in members
                for name in self.matrices
                if name.startswith(f"{path}.{key}.") and (x := self.trace.input_of(name)) is not None
            ]
            for key in members if inputs else []:
                expert, x = self.block.get_submodule(f"{path}.{key}"), inputs[0][1]
                if _takes_one_tensor(expert):
                    inner = _Search(expert, lambda expert=expert, x=x: expert(x))
                    yield from (_moved(pair, f"{path}.{key}.") for pair in inner.linear_pairs())

    # candidates

    def _readers_of(self, call: NormCall) -> list[str]:
        """Matrices that are given rows of a norm's output, and in a list of experts those that were not reached."""
        rows = _rows(call.y)
        width = call.y.shape[-1]
        found: dict[str, None] = {}
        for key, x in self.trace.products:
            if key.name not in found and x.shape[-1] == width and _rows(x) <= rows:
                found[key.name] = None
                for path, members in self.lists.items():
                    if key.name.startswith(f"{path}."):
                        inner = key.name.removeprefix(f"{path}.").partition(".")[2]
                        found |= dict.fromkeys(f"{path}.{member}.{inner}" for member in members)
        return list(found)

    def _groups(self) -> list[list[str]]:
        """Matrices that share an input which is no norm's output, in the order of the calls."""
        groups: list[tuple[Tensor, list[str]]] = []
        seen = set(self.read_from_norm)
        for key, x in self.trace.products:
            if key.name in seen or below(key.name, self.lists):
                continue
            seen.add(key.name)
            for other, names in groups:
                if key.expert is None and other.shape == x.shape and torch.equal(other, x):
                    names.append(key.name)
                    break
            else:
                groups.append((x, [key.name]))
        return [names for _, names in groups]

    def _plain(self, readers: Sequence[str]) -> Iterator[Pair]:
        """v -> o or up -> down with a matrix as the writer: those whose rows, rescaled, rescale the readers' inputs."""
        x = self.trace.input_of(readers[0])
        if x is None:
            return
        columns = x.shape[-1]
        for writer in self._writers(readers):
            for layout in candidate_layouts(self._shape(writer)[0], columns, _counts(self.block, writer)):
                pair = self._pair(writer, readers, layout)
                expected = self._follows(pair, x, columns // layout.width)
                if expected is not None:
                    yield expected

    def _stacked(self, reader: str) -> Iterator[Pair]:
        """up -> down inside a stack of experts."""
        owner, columns = self.matrices[reader].module, self._shape(reader)[1]
        for writer in self._writers([reader]):
            if self.matrices[writer].module == owner and self.matrices[writer].experts > 1:
                for layout in candidate_layouts(self._shape(writer)[0], columns, ()):
                    if layout.width == columns:
                        yield self._pair(writer, [reader], layout)

    def _writers(self, readers: Sequence[str]) -> list[str]:
        """Matrices used before the readers: beside them in the module tree, else the nearest; likely ones first."""
        order = list(dict.fromkeys(key.name for key, _ in self.trace.products))
        before = [name for name in order[: min(map(order.index, readers))] if not below(name, self.lists)]
        home = self._home(readers[0])
        shared = {name: _common(home, self._home(name)) for name in before}
        near = [name for name in before if shared[name] == max(shared.values())]
        beside = [name for name in near if self._home(name) == home]
        return sorted(beside or near, key=lambda name: (not _LIKELY.search(name), -order.index(name)))

    def _home(self, name: str) -> list[str]:
        """The path of the module that holds a linear, or that is a stack of experts."""
        matrix = self.matrices[name]
        return (matrix.module if matrix.experts > 1 else matrix.module.rpartition(".")[0]).split(".")

    # proofs

    def _follows(self, pair: Pair, x: Tensor, repeats: int) -> Pair | None:
        """The pair with its heads as far as scaling shows them, if rescaling only the writer rescales `x` likewise."""
        factors = _factors((pair.width,), x.device)
        with restoring(self.block, names_of(pair)):
            rescale(self.block, replace(pair, readers=()), 1 / factors)
            now = self._again().input_of(pair.readers[0])
        if now is None or now.shape != x.shape:
            return None
        heads = [0] if repeats == 1 else [size for size in range(pair.width, 0, -1) if pair.width % size == 0]
        for head in heads:
            tried = replace(pair, repeats=repeats, head=head)
            if difference(x * to_columns(tried, factors), now) <= TOLERANCE:
                return tried
        return None

    def _holds(self, pair: Pair) -> bool:
        experts = max(self.matrices[name].experts for name in pair.readers) if pair.kind == "linear" else 1
        shape = (experts, pair.width) if experts > 1 else (pair.width,)
        with restoring(self.block, names_of(pair)):
            rescale(self.block, pair, _factors(shape, self.trace.output.device))
            return self._same()

    def _same(self) -> bool:
        return difference(self.trace.output, self.run(), self.routed) <= TOLERANCE

    def _again(self) -> Trace:
        return trace(self.block, self.run, self.matrices, ())

    # facts

    def _shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one matrix."""
        shape = self.block.get_parameter(name).shape[-2:]
        return (shape[1], shape[0]) if self.matrices[name].transposed else (shape[0], shape[1])

    def _transposed(self, names: Sequence[str]) -> frozenset[str]:
        return frozenset(name for name in names if self.matrices[name].transposed)

    def _pair(self, writer: str, readers: Sequence[str], layout: Layout) -> Pair:
        return Pair(
            "linear",
            writer,
            tuple(readers),
            layout.width,
            bias=bias_of(self.block, writer),
            transposed=self._transposed([writer, *readers]),
            start=layout.start,
            span=layout.span,
            stride=layout.stride,
        )


def gain_of(norm: nn.Module, call: NormCall) -> tuple[str, float, str] | None:
    """(gain, offset, bias) of a norm: names of its parameters, "" for no bias; None if the gain does not enter as a
    factor (offset + gain), with offset 0 or 1, on what is normalized."""
    names = [name for name, _ in norm.named_parameters()]
    width = call.y.shape[-1]
    if any(norm.get_parameter(name).shape != (width,) for name in names) or len(names) > 2:
        return None
    for gain in names:
        bias = next((name for name in names if name != gain), "")
        with restoring(norm, names):
            outputs: list[Tensor] = []
            for value in (0.0, 1.0):
                for name in names:
                    norm.get_parameter(name).data.fill_(value if name == gain else 0.0)
                outputs.append(call.again())
            at_zero, at_one = outputs
            if bias:  # gain 1, bias 1
                norm.get_parameter(bias).data.fill_(1.0)
                if difference(at_one + 1.0, call.again()) > TOLERANCE:
                    continue
            if not bool(at_one.any()):
                continue
            if not bool(at_zero.any()):
                return gain, 0.0, bias
            if difference(2 * at_zero, at_one) <= TOLERANCE:
                return gain, 1.0, bias
    return None


_LIKELY = re.compile(r"(^|[._])v(_|alue)|up|w3\b|wi_1|fc_?1|fc_in|c_fc|qkv|query_key_value|c_attn|kv_b|h_to_4h", re.I)


def _factors(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random factors between 1/2 and 2, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.exp2(2 * torch.rand(shape, generator=generator) - 1).to(device)


def _rows(x: Tensor) -> set[bytes]:
    rows = x.reshape(-1, x.shape[-1]).contiguous().cpu()
    return {row.tobytes() for row in rows.view(torch.uint8).numpy()}


def _counts(block: nn.Module, name: str) -> list[int]:
    """Integers that the modules around a parameter, or their configuration, hold: numbers of heads are among them."""
    found: set[int] = set()
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = block.get_submodule(path)
        for holder in (module, getattr(module, "config", None)):
            found |= {value for value in vars(holder or module).values() if type(value) is int and value > 1}
    return sorted(found)


def _expert_lists(matrices: dict[str, Matrix], block: nn.Module) -> dict[str, list[str]]:
    """Path of each list of experts (a module each) -> the keys of its members."""
    lists: dict[str, list[str]] = {}
    for name, matrix in matrices.items():
        if matrix.role == "expert" and matrix.experts == 1 and block.get_parameter(name).ndim == 2:
            parts = name.split(".")
            place = max(i for i, part in enumerate(parts) if "expert" in part)
            path = ".".join(parts[: place + 1])
            lists[path] = [key for key, _ in block.get_submodule(path).named_children()]
    return lists


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return next((i for i, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return len(needed) == 1


def _moved(pair: Pair, prefix: str) -> Pair:
    return replace(
        pair,
        writer=prefix + pair.writer,
        readers=tuple(prefix + name for name in pair.readers),
        bias=prefix + pair.bias if pair.bias else "",
        transposed=frozenset(prefix + name for name in pair.transposed),
    )
