"""Quantized inputs of convolutions, by simulation, and where their scales may stand.

A convolution is one more contraction: the sum runs over input channels and kernel positions. One input element is read
at several kernel positions, so its place in space is summed over too, whichever output position is looked at. What is
left for the scales of an input is the sample alone: one scale for all, or one for each sample.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec
from bitgrain.numerics.convolution import Convolution
from bitgrain.runtime.activations import InputQuantizer, quantize_inputs
from bitgrain.runtime.attention.contraction import Contraction

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

CONTRACTION = Contraction("the convolution", "bci,oci->bo")
"""At one output position: b sample, c input channel, i kernel position, o output channel."""


def geometry_of(module: nn.Module) -> Convolution:
    """The geometry of a module of torch's convolutions."""
    m: Any = module
    dims = len(m.kernel_size)
    if m.padding == "same":
        reach = [step * (size - 1) for step, size in zip(m.dilation, m.kernel_size, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in reach)
    elif m.padding == "valid":
        padding = ((0, 0),) * dims
    else:
        padding = tuple((size, size) for size in m.padding)
    return Convolution(
        kernel=tuple(m.kernel_size),
        stride=tuple(m.stride),
        padding=padding,
        dilation=tuple(m.dilation),
        groups=m.groups,
        mode="constant" if m.padding_mode == "zeros" else m.padding_mode,
        transposed=bool(m.transposed),
        output_padding=tuple(m.output_padding),
    )


def check_inputs(spec: QuantSpec, name: str) -> None:
    """Raises SchemeError for scales of inputs that a convolution cannot have, with the reason.

    Static scales for each input channel are let pass: no engine can take them out of the sum, but their simulation
    shows what they would give.
    """
    tile = (spec.granularity.rows, spec.granularity.cols)
    if spec.threshold:
        raise SchemeError(f"{name}: outlier channels above a threshold are for linear layers, not for convolutions")
    if tile in ((None, None), (1, None)) or (tile == (None, 1) and not spec.dynamic):
        return
    CONTRACTION.check(0, "c", f"{name}: inputs {spec.describe()}")


class ConvolutionInput(nn.Module):
    """x [samples, channels, *space], or without samples -> the same on the grid of `quantizer`, which sees a row for
    each sample, or channels last where each has its own scale."""

    def __init__(self, quantizer: InputQuantizer, dims: int) -> None:
        super().__init__()
        check_inputs(quantizer.spec, "this convolution")
        self.quantizer = quantizer
        self.by_channel = quantizer.spec.granularity.cols is not None
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        batched = x if x.ndim == self.dims + 2 else x.unsqueeze(0)
        if self.by_channel:
            rounded = self.quantizer(batched.movedim(1, -1)).movedim(-1, 1)
        else:
            rounded = self.quantizer(batched.flatten(1)).view(batched.shape)
        return rounded.contiguous().view(x.shape)


def quantize_layer_inputs(module: nn.Module, quantizer: InputQuantizer) -> None:
    """`quantize_inputs` of a linear layer or a convolution."""
    if isinstance(module, CONVOLUTIONS):
        quantize_inputs(module, ConvolutionInput(quantizer, len(module.kernel_size)))
    else:
        quantize_inputs(module, quantizer)


def input_quantizer_of(module: nn.Module) -> InputQuantizer | None:
    """What `quantize_layer_inputs` gave to a layer; None where its inputs are as they are."""
    found = getattr(module, "input_quantizer", None)
    found = found.quantizer if isinstance(found, ConvolutionInput) else found
    return found if isinstance(found, InputQuantizer) else None
