"""What reads and writes the residual stream, in a block and outside the blocks: what a rotation must reach.

Only candidates are found here: the transform that uses them proves its result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from bitgrain.models.pairs import find_pairs, gain_of
from bitgrain.models.structure import find_matrices
from bitgrain.models.trace import NormCall, below, norm_paths, trace
from bitgrain.runtime.watch import Watch, parameters_of
from bitgrain.transforms.base import Pair, Stream
from bitgrain.transforms.rescale import bias_of, restoring

_CENTRED = 1e-4
"""Largest mean of a normalized token, in standard deviations, that counts as zero."""


def find_stream(block: nn.Module, run: Callable[[], Tensor], pairs: Sequence[Pair]) -> Stream:
    """The residual stream of a block with real weights. `run` and `pairs`: as for and from `find_pairs`."""
    return _stream(block, run, pairs, ())


def find_outside(model: nn.Module, run: Callable[[], Tensor], blocks: Collection[str]) -> Stream:
    """The same for a model without its blocks (paths): embeddings write, the final norm reads for the head.

    run  the model's output for a few tokens, each block handing on its input; blocks may be on the meta device
    """
    return _stream(model, run, find_pairs(model, run, blocks), blocks)


@torch.no_grad()
def _stream(module: nn.Module, run: Callable[[], Tensor], pairs: Sequence[Pair], outside: Collection[str]) -> Stream:
    matrices = {name: one for name, one in find_matrices(module).items() if not below(name, outside)}
    seen = trace(module, run, (), norm_paths(module, outside))
    hidden = seen.norms[-1].y.shape[-1] if outside and seen.norms else seen.output.shape[-1]
    norms = tuple(pair for pair in pairs if pair.kind == "norm" and pair.width == hidden)
    calls = [call for call in seen.norms if call.y.shape[-1] == hidden]
    taken = {name for pair in norms for name in pair.readers} | {pair.writer for pair in pairs}
    # what reads another norm may lie in the middle (MLA's q_b) or write (behind a gated norm): is it added as it is?
    unclear = {name for pair in pairs if pair.kind == "norm" and pair not in norms for name in pair.readers} & {
        *matrices
    }
    taken |= unclear - _added(module, run, unclear)
    writers: list[str] = []
    transposed: set[str] = set()
    for name, one in matrices.items():
        shape = module.get_parameter(name).shape
        by_row = one.role == "embedding" or one.transposed
        may = one.role not in ("conv", "lm_head", "router") and name not in taken
        if may and shape[-1 if by_row else -2] == hidden:
            writers.append(name)
            transposed |= {name} if by_row else set()
    return Stream(
        hidden,
        norms,
        tuple(writers),
        tuple(bias for name in writers if (bias := bias_of(module, name))),
        frozenset(transposed),
        any(_is_centred(module.get_submodule(call.path), call) for call in calls),
        _doubt(module, calls, norms, bool(outside)),
    )


def _added(module: nn.Module, run: Callable[[], Tensor], names: Collection[str]) -> set[str]:
    """Those of the matrices whose output, unchanged, is added to something."""
    found: set[str] = set()
    if names:
        with Watch(parameters_of(module, names), lambda _key, _x: None, lambda key, _x, _sum: found.add(key.name)):
            run()
    return found


def _is_centred(norm: nn.Module, call: NormCall) -> bool:
    """Whether the norm subtracts the mean: then its output has none, once gain and bias are put aside."""
    entry = gain_of(norm, call)
    if entry is None:
        return False
    gain, offset, bias = entry
    with restoring(norm, [name for name in (gain, bias) if name]):
        norm.get_parameter(gain).data.fill_(1.0 - offset)
        if bias:
            norm.get_parameter(bias).data.zero_()
        y = call.again()
    return bool(y.mean(-1).abs().max() <= _CENTRED * y.std())


def _doubt(module: nn.Module, calls: Sequence[NormCall], norms: Sequence[Pair], outside: bool) -> str:
    known = {pair.writer for pair in norms}
    alone = sorted({call.path for call in calls if call.path not in known})
    if not alone:
        return ""
    if outside and _is_tied(module):
        return (
            f"lm_head is tied with the embeddings, so the gain of {alone[-1]} cannot move into it (to untie them, save "
            "the checkpoint with tie_word_embeddings false and a copy of the embeddings as lm_head)"
        )
    return f"the output of the norm {alone[0]} is not read by matrices only (a norm behind attention or MLP)"


def _is_tied(model: nn.Module) -> bool:
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    return any(isinstance(part, nn.Linear) and id(part.weight) in embeddings for part in model.modules())
