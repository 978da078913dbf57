"""Rotations of the residual stream and of the heads (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

R1  every writer of the residual stream is multiplied by an orthogonal Q, every reader by its inverse: outliers of
    single channels spread over all of them. Norm gains are folded first, since only x / |x| commutes with a rotation.
R2  each head of v by an orthogonal matrix, o by its inverse.
Both are folded into the weights: nothing is computed at run time. (R3 and R4, which are, are not offered.)
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitgrain.errors import ModelError
from bitgrain.transforms.base import BlockView, OutsideView, Stream, register_transform
from bitgrain.transforms.fold import fold
from bitgrain.transforms.hadamard import Rotation
from bitgrain.transforms.proof import TOLERANCE, check_same, difference, routes
from bitgrain.transforms.rescale import matrix_of, mix_heads, reader_of


@register_transform("rotate")
@dataclass(frozen=True)
class Rotate:
    """r1: rotate the residual stream; r2: rotate the heads of v and o; seed: of the random signs."""

    r1: bool = True
    r2: bool = True
    seed: int = 0
    whole_model: ClassVar[bool] = True

    def apply_outside(self, view: OutsideView) -> dict[str, Any]:
        """Rotates embeddings and head. From then on, hidden states that enter the blocks are rotated."""
        if not self.r1:
            return {}
        before = view.run()
        fold(view.module, view.stream.norms)
        rotation = self._rotation(view.stream)
        rotate_stream(view.module, view.stream, rotation)
        found = difference(before, view.run())
        if not found <= TOLERANCE:
            raise ModelError(_refusal("the model", view.stream, found))
        return {"hidden": rotation.n, "difference": found}

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
        if self.r1:
            stream = block.stream
            if stream is None:
                raise ModelError(f"{block.path}: its residual stream is unknown, so it cannot be rotated")
            rotation = self._rotation(stream)
            with _turned_back(block.module, rotation):
                before = rotation(block.run(0))
            fold(block.module, stream.norms)
            rotate_stream(block.module, stream, rotation)
            found = difference(before, block.run(0), routed)
            if not found <= TOLERANCE:
                raise ModelError(_refusal(block.path, stream, found))
            figures["difference"] = found
        return figures

    def _rotation(self, stream: Stream) -> Rotation:
        return Rotation(stream.hidden, self.seed, stream.centred)

    def _of_head(self, block: BlockView, size: int, head: int) -> Tensor:
        return Rotation(size, zlib.crc32(f"{self.seed} {block.path} {head}".encode())).matrix()


@torch.no_grad()
def rotate_stream(module: nn.Module, stream: Stream, rotation: Rotation) -> None:
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
def _turned_back(module: nn.Module, rotation: Rotation) -> Generator[None]:
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


def _is_stream(value: Any, rotation: Rotation) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == rotation.n


def _refusal(where: str, stream: Stream, found: float) -> str:
    reason = stream.doubt or "something else reads or writes its residual stream"
    return (
        f"{where} cannot be rotated: {reason} (the output would change by {found:.2g} of its spread); "
        "use rotate with r1: false, which rotates the heads only, or leave it out"
    )
