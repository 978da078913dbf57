"""Rotations of the residual stream and of the heads (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

R1  every writer of the residual stream is multiplied by an orthogonal Q, every reader by its inverse: outliers of
    single channels spread over all of them. Norm gains are folded first, since only x / |x| commutes with a rotation.
R2  each head of v by an orthogonal matrix, o by its inverse.
R4  what an MLP's down reads, at run time (`runtime.online`), since its writer stands behind a nonlinearity.
R1 and R2 are folded into the weights: nothing is computed at run time. With `learn`, R1 starts as a Hadamard matrix and
is then fitted to the stream (`learn_rotation`). R3, of queries and keys, changes what a cache of keys holds and the
input of no matrix: it belongs to caches.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import ModelError, SchemeError
from bitgrain.numerics.hadamard import Rotation
from bitgrain.runtime.online import rotate_inputs
from bitgrain.transforms.base import BlockView, OutsideView, Stream, register_transform
from bitgrain.transforms.fold import fold
from bitgrain.transforms.learn_rotation import Learned, learn_rotation
from bitgrain.transforms.proof import TOLERANCE, check_same, difference, routes
from bitgrain.transforms.rescale import matrix_of, mix_heads, reader_of


@register_transform("rotate")
@dataclass(frozen=True)
class Rotate:
    """r1: rotate the residual stream; r2: the heads of v and o; r4: the inputs of down, at run time, where they are
    quantized with its weights; learn: steps in which r1 is fitted (200 do), 0 for none; seed: of the random signs."""

    r1: bool = True
    r2: bool = True
    r4: bool = False
    learn: int = 0
    seed: int = 0
    whole_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.learn < 0 or (self.learn and not self.r1):
            raise SchemeError(f"rotate: learn is a number of steps in which r1 is fitted, not {self.learn} of {self}")

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Rotates embeddings and head. From then on, hidden states that enter the blocks are rotated."""
        if not self.r1:
            return {}
        figures: dict[str, Any] = {}
        if self.learn:
            start = Rotation(view.stream.hidden, self.seed, view.stream.centred).matrix()
            tokens = view.residuals()
            q, first, last = learn_rotation(
                tokens, start, steps=self.learn, keep_mean=view.stream.centred, seed=self.seed
            )
            view.memory["rotation"] = Learned(q)
            figures = {"peaks_before": first, "peaks_after": last}
        before = view.run()
        fold(view.module, view.stream.norms)
        rotation = self._rotation(view.stream, view.memory)
        rotate_stream(view.module, view.stream, rotation)
        found = difference(before, view.run())
        if not found <= TOLERANCE:
            raise ModelError(_refusal("the model", view.stream, found))
        return {"hidden": rotation.n, "difference": found, **figures}

    def apply(self, block: BlockView) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        routed = routes(block.module)
        if self.r2:
            heads = [pair for pair in block.pairs if pair.mixes and pair.head]
            before = block.run(0)
            for pair in heads:
                device = block.module.get_parameter(pair.writer).device
                count = pair.width // pair.head
                mix_heads(
                    block.module,
                    pair,
                    torch.stack([self._of_head(block, pair.head, h) for h in range(count)]).to(device),
                )
            figures["heads"] = check_same(before, block.run(0), block.path, "rotating the heads of v and o", routed)
        if self.r4:
            before = block.run(0)
            figures["online"] = self._rotate_online(block)
            figures["inputs"] = check_same(before, block.run(0), block.path, "rotating the inputs of down", routed)
        if self.r1:
            stream = block.stream
            if stream is None:
                raise ModelError(f"{block.path}: its residual stream is unknown, so it cannot be rotated")
            rotation = self._rotation(stream, block.memory)
            with _turned_back(block.module, rotation):
                before = rotation(block.run(0))
            fold(block.module, stream.norms)
            rotate_stream(block.module, stream, rotation)
            found = difference(before, block.run(0), routed)
            if not found <= TOLERANCE:
                raise ModelError(_refusal(block.path, stream, found))
            figures["difference"] = found
        return figures

    @torch.no_grad()
    def _rotate_online(self, block: BlockView) -> dict[str, dict[str, int]]:
        """Which modules got a rotation, and which: those that read neither a norm nor the heads of v. Stacks of experts
        are no modules and are left alone."""
        norms = block.stream.norms if block.stream is not None else ()
        folded = {name for pair in (*block.pairs, *norms) if pair.kind == "norm" or pair.head for name in pair.readers}
        found: dict[str, dict[str, int]] = {}
        for name in sorted(block.specs.keys() - folded):
            path, _, leaf = name.rpartition(".")
            module = block.module.get_submodule(path)
            if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
                continue
            weight = matrix_of(block.module, name, isinstance(module, Conv1D))
            seed = zlib.crc32(f"{self.seed} {block.path} {name}".encode())
            rotation = Rotation(weight.shape[-1], seed)
            weight.copy_(rotation(weight))
            rotate_inputs(module, rotation)
            found[path] = {"size": rotation.n, "seed": seed}
        return found

    def _rotation(self, stream: Stream, memory: Mapping[str, Any]) -> Rotation | Learned:
        return memory.get("rotation") or Rotation(stream.hidden, self.seed, stream.centred)

    def _of_head(self, block: BlockView, size: int, head: int) -> Tensor:
        return Rotation(size, zlib.crc32(f"{self.seed} {block.path} {head}".encode())).matrix()


@torch.no_grad()
def rotate_stream(module: nn.Module, stream: Stream, rotation: Rotation | Learned) -> None:
    """What writers add to the stream becomes rotated; readers turn it back, in place. Gains must be 1."""
    for name in stream.writers:
        weight = matrix_of(module, name, name in stream.transposed)
        weight.copy_(rotation(weight.mT).mT)
    vectors = [*stream.biases, *(pair.bias for pair in stream.norms if pair.bias)]
    for name in vectors:
        data = module.get_parameter(name).data
        data.copy_(rotation(data))
    for pair in stream.norms:
        for name in pair.readers:
            weight = reader_of(module, pair, name)
            weight.copy_(rotation(weight))


@contextmanager
def _turned_back(module: nn.Module, rotation: Rotation | Learned) -> Generator[None]:
    """Inside, the module is given its rotated input as it would be without rotation."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tuple(args), dict(kwargs)
        for place, value in enumerate(args):
            if _is_stream(value, rotation):
                return (*args[:place], rotation.undo(value), *args[place + 1 :]), kwargs
        for name, value in kwargs.items():
            if _is_stream(value, rotation):
                return args, {**kwargs, name: rotation.undo(value)}
        return args, kwargs

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_stream(value: Any, rotation: Rotation | Learned) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == rotation.n


def _refusal(where: str, stream: Stream, found: float) -> str:
    reason = stream.doubt or "something else reads or writes its residual stream"
    return (
        f"{where} cannot be rotated: {reason} (the output would change by {found:.2g} of its spread); "
        "use rotate with r1: false, which rotates the heads only, or leave it out"
    )
