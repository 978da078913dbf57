"""Scheme: what one layer gets, and the presets under the names that the field knows.

Names read W<bits of weights>A<bits of activations>. Where vLLM and compressed-tensors have a preset of the same name,
ours has the same formats and granularities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bitgrain.errors import SchemeError, unknown_name
from bitgrain.numerics import (
    Granularity,
    IntFormat,
    QuantSpec,
    get_format,
    mxfp4,
    nvfp4,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)
from bitgrain.numerics.columns import ColumnChoice
from bitgrain.numerics.formats import BF16, FP4_E2M1, FP8_E4M3, FP16, FP32
from bitgrain.numerics.gguf_types import GGUF_TYPES, block_size, fits_gguf
from bitgrain.numerics.ranges import OutputSearch
from bitgrain.numerics.spec import bnb_4bit, int_weight, nf4_double_quantized

# NVFP4 activations choose a scale for each 16 values at run time, in E4M3, times one constant. A quarter lets them
# reach blocks with maxima from 0.004 to 672 without calibration data.
NVFP4_INPUT_OUTER_SCALE = 0.25


@dataclass(frozen=True)
class Scheme:
    """QuantSpecs of a linear layer's weight, input and output; None leaves it as it is.

    prescribed  the weight's storage is that of a file type: scales do not take the checkpoint's dtype, blocks are whole
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None
    output: QuantSpec | None = None
    prescribed: bool = False

    def __post_init__(self) -> None:
        if any(s is not None and s.granularity.run is not None for s in (self.weight, self.input, self.output)):
            raise SchemeError(f"{self.name}: runs over the ends of rows are for scales of scales")
        if self.weight.clusters:
            raise SchemeError(f"{self.name}: clusters of channels are for static inputs, weights have groups")
        if isinstance(self.weight.range, OutputSearch):
            raise SchemeError(
                f"{self.name}: range search is for static scales of inputs, not for weights: use weighted, which knows "
                "the inputs too"
            )
        if any(spec is not None and spec.columns is not None for spec in (self.input, self.output)):
            raise SchemeError(f"{self.name}: columns are kept of weights, not of inputs or outputs")
        if self.weight.columns is not None and self.input is not None and not self.input.dynamic:
            raise SchemeError(f"{self.name}: columns of the weight are kept beside inputs with dynamic scales only")

    @property
    def needs_calibration(self) -> bool:
        """Whether activations have static scales, or columns are kept by activation, which only data can tell."""
        if self.weight.columns is not None and self.weight.columns.needs_inputs:
            return True
        return any(spec is not None and not spec.dynamic for spec in (self.input, self.output))

    def for_dtype(self, dtype: torch.dtype) -> Scheme:
        """The same with plain scales in the checkpoint's own dtype: engines decode to the dtype of the scale, and
        keep static input scales in it."""
        storage = {torch.float16: FP16, torch.bfloat16: BF16}.get(dtype, FP32)
        static = self.input is not None and not self.input.dynamic
        inputs = self.input.with_scale_dtype(storage) if self.input is not None and static else self.input
        weight = self.weight if self.prescribed else self.weight.with_scale_dtype(storage)
        if weight.columns is not None:
            weight = replace(weight, columns=weight.columns.for_dtype(dtype))
        return replace(self, weight=weight, input=inputs)

    def indivisible(self, out_features: int, in_features: int) -> str | None:
        """Why tiles do not fit a weight [out, in], or None. Blocks cut at the last rows are allowed."""
        if self.prescribed and not fits_gguf(self.weight, (out_features, in_features)):
            return f"blocks of {block_size(self.weight)} weights do not divide {in_features} input features"
        for what, spec in (("weight", self.weight), ("input", self.input)):
            if spec is None or spec.granularity.cols in (None, 1):
                continue
            if in_features % spec.granularity.cols:
                return f"{what} {spec.granularity} does not divide {in_features} input features"
        return None

    def by_channel(self) -> Scheme:
        """The same with one scale for each output channel and each token, for layers that groups do not divide; static
        scales of inputs stay as they are.

        Raises SchemeError for FP4, which has no such form in any engine, and for what a file type prescribes.
        """
        if self.prescribed:
            raise SchemeError(f"{self.name} exists only in blocks; use --on-indivisible skip, or --bits --engine gguf")
        if self.weight.format == FP4_E2M1:
            raise SchemeError(
                f"{self.name}: FP4 exists only in groups, no engine reads it per channel; use --on-indivisible skip"
            )
        token = self.input
        if token is not None and token.dynamic:
            token = replace(token, granularity=Granularity(1, None))
        return replace(
            self,
            name=f"{self.name}/channel",
            weight=replace(self.weight, granularity=per_channel()),
            input=token,
        )


def _int8(granularity: Granularity, dynamic: bool = False) -> QuantSpec:
    return QuantSpec(IntFormat(8), granularity, restricted=True, dynamic=dynamic)


def _fp8(granularity: Granularity, dynamic: bool = False) -> QuantSpec:
    return QuantSpec(FP8_E4M3, granularity, dynamic=dynamic)


def _clustered(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat(bits), per_tensor(), zero_point="integer", clusters=32)


_TOKEN_INT8 = _int8(per_channel(), dynamic=True)
_TOKEN_FP8 = _fp8(per_channel(), dynamic=True)

PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("W8A16", int_weight(8)),
        Scheme("W4A16", int_weight(4, 128)),
        Scheme("W4A16_ASYM", int_weight(4, 128, asymmetric=True)),
        Scheme("W4A16_CHANNEL", int_weight(4)),
        Scheme("W3A16", int_weight(3, 128)),
        Scheme("W3A16_ASYM", int_weight(3, 128, asymmetric=True)),
        Scheme("W2A16", int_weight(2, 128)),
        Scheme("W2A16_ASYM", int_weight(2, 64, asymmetric=True)),
        Scheme("W8A16_TENSOR", _int8(per_tensor())),
        Scheme("W8A8", _int8(per_channel()), _TOKEN_INT8),
        Scheme("LLM_INT8", _int8(per_channel()), replace(_TOKEN_INT8, threshold=6.0)),
        Scheme("LLM_INT8_STATIC", replace(_int8(per_channel()), columns=ColumnChoice(0.02)), _TOKEN_INT8),
        Scheme("W8A8_STATIC", _int8(per_channel()), replace(_int8(per_tensor()), range=OutputSearch())),
        Scheme("W8A8_RPTQ", _int8(per_channel()), _clustered(8)),
        Scheme("W4A8_RPTQ", int_weight(4, 128), _clustered(8)),
        Scheme("W4A4_RPTQ", int_weight(4, 128), _clustered(4)),
        Scheme("INT8_TENSOR", _int8(per_tensor()), _TOKEN_INT8),
        Scheme("W4A8", int_weight(4, 128), _TOKEN_INT8),
        Scheme("W4AFP8", int_weight(4, 128), _TOKEN_FP8),
        Scheme("W4A4", int_weight(4, 128), QuantSpec(IntFormat(4), per_channel(), restricted=True, dynamic=True)),
        Scheme("TERNARY", QuantSpec(get_format("ternary"), per_group(128))),
        Scheme("W8A16INT16", int_weight(8), QuantSpec(IntFormat(16), per_channel(), restricted=True, dynamic=True)),
        Scheme("FP8", _fp8(per_tensor()), _fp8(per_tensor())),
        Scheme("FP8_DYNAMIC", _fp8(per_channel()), _TOKEN_FP8),
        Scheme("FP8_BLOCK", _fp8(per_block(128, 128)), _fp8(per_group(128), dynamic=True)),
        Scheme("MXFP4A16", mxfp4()),
        Scheme("MXFP4", mxfp4(), mxfp4(dynamic=True)),
        Scheme("NVFP4A16", nvfp4()),
        Scheme("NVFP4", nvfp4(), nvfp4(dynamic=True)),
        Scheme("NF4", nf4_double_quantized()),
        Scheme("NF4_BNB", bnb_4bit("nf4")),
        Scheme("FP4_BNB", bnb_4bit("bnb_fp4")),
        *(Scheme(f"GGUF_{name}", spec, prescribed=True) for name, spec in GGUF_TYPES.items()),
    )
}
ALIASES = {"INT8": "W8A8", "INT8_STATIC": "W8A8_STATIC", "W158A16": "TERNARY", "W1.58A16": "TERNARY"}


def get_scheme(name: str) -> Scheme:
    """The preset called `name` (case-insensitive; `-` reads as `_`). Raises SchemeError that lists all."""
    key = name.strip().upper().replace("-", "_")
    key = ALIASES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    known = [*PRESETS, *ALIASES]
    raise SchemeError(unknown_name("scheme", name, known, key))


def eight_bits(scheme: Scheme) -> Scheme:
    """What a layer falls back to that `scheme` would harm: int8 weights with its integer inputs, or with none (W8A8,
    W8A16); FP8_DYNAMIC where inputs are floating-point."""
    if scheme.input is None:
        return PRESETS["W8A16"]
    if not isinstance(scheme.input.format, IntFormat):
        return PRESETS["FP8_DYNAMIC"]
    return replace(PRESETS["W8A8"], name=f"{scheme.name}_FALLBACK", input=scheme.input)
