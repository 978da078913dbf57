"""Pure functions on tensors: formats, granularities, ranges, and quantize / dequantize / fake_quantize."""

from bitgrain.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat, get_format
from bitgrain.numerics.granularity import (
    Granularity,
    parse_granularity,
    per_block,
    per_channel,
    per_group,
    per_row_group,
    per_run,
    per_tensor,
    per_token,
)
from bitgrain.numerics.qtensor import QTensor
from bitgrain.numerics.quantize import choose_scale, dequantize, fake_quantize, quantize
from bitgrain.numerics.spec import QuantSpec, mxfp4, nvfp4

__all__ = [
    "CodebookFormat",
    "FloatFormat",
    "Format",
    "Granularity",
    "IntFormat",
    "QTensor",
    "QuantSpec",
    "choose_scale",
    "dequantize",
    "fake_quantize",
    "get_format",
    "mxfp4",
    "nvfp4",
    "parse_granularity",
    "per_block",
    "per_channel",
    "per_group",
    "per_row_group",
    "per_run",
    "per_tensor",
    "per_token",
    "quantize",
]
