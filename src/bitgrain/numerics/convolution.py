"""A convolution as a matrix product: its weight as [out, in/groups * kernel], its input unfolded into patches.

A patch holds what one output position sums over, in the order in which the weight's matrix has its columns, so that
convolution = patches x matrix (im2col). Then solvers, ranges and granularities need not know of convolutions: "input
features" are input channels x kernel positions, and output channels are rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution over len(kernel) dimensions; every tuple has one number for each.

    padding      at the beginning and the end of each dimension, cropped where it is negative
    mode         of padding, as `torch.nn.functional.pad` names it
    transposed   the weight is [in, out/groups, *kernel] and the input is spread by `stride`; `padding` and
                 `output_padding` are as in torch's ConvTranspose
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "constant"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """Of space (or time)."""
        return len(self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        """[out, in/groups * kernel] of a weight in torch's shape. Rows of one group follow each other."""
        if not self.transposed:
            return weight.reshape(weight.shape[0], -1)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(self.groups * weight.shape[1], -1)

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        inputs = matrix.shape[1] // math.prod(self.kernel)
        if not self.transposed:
            return matrix.reshape(matrix.shape[0], inputs, *self.kernel)
        grouped = matrix.reshape(self.groups, -1, inputs, *self.kernel).transpose(1, 2)
        return grouped.reshape(self.groups * inputs, -1, *self.kernel)

    def batched(self, x: Tensor) -> Tensor:
        """[samples, channels, *space] of an input with or without samples."""
        return x if x.ndim == self.dims + 2 else x.unsqueeze(0)

    def patches(self, x: Tensor) -> Tensor:
        """[samples, groups, in/groups * kernel, positions] of x [samples, channels, *space]."""
        if self.transposed:
            x = self._spread(x)
        pads = [size for pair in reversed(self.padding) for size in pair]
        if any(pads) and not self.transposed:
            x = F.pad(x, pads, mode=self.mode)
        steps = (1,) * self.dims if self.transposed else self.stride
        for i, (size, step, dilation) in enumerate(zip(self.kernel, steps, self.dilation, strict=True)):
            x = x.unfold(2 + i, dilation * (size - 1) + 1, step)[..., ::dilation]
        if self.transposed:
            x = x.flip(tuple(range(-self.dims, 0)))
        samples, channels = x.shape[:2]
        positions = math.prod(x.shape[2 : 2 + self.dims])
        x = x.reshape(samples, channels, positions, math.prod(self.kernel)).transpose(2, 3)
        return x.reshape(samples, self.groups, -1, positions)

    def _spread(self, x: Tensor) -> Tensor:
        """The input of the plain convolution, with a flipped kernel and stride 1, that a transposed one equals."""
        wide = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.stride, strict=True)]
        spread = torch.zeros(*x.shape[:2], *wide, dtype=x.dtype, device=x.device)
        spread[(..., *(slice(None, None, step) for step in self.stride))] = x
        pads: list[int] = []
        for i in reversed(range(self.dims)):
            reach = self.dilation[i] * (self.kernel[i] - 1)
            pads += [reach - self.padding[i][0], reach - self.padding[i][1] + self.output_padding[i]]
        return F.pad(spread, pads)


def dense_matrix(matrix: Tensor, groups: int) -> Tensor:
    """[out, in * kernel]: the matrix of a convolution with groups, with the zeros between them."""
    return matrix if groups == 1 else torch.block_diag(*matrix.chunk(groups))
