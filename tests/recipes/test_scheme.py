"""Presets under the names that the field knows."""

from dataclasses import replace

import pytest
import torch

from bitgrain.errors import SchemeError
from bitgrain.numerics import IntFormat, QuantSpec, get_format, per_block, per_channel, per_group, per_tensor
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.recipes import ALIASES, PRESETS, Scheme, get_scheme
from bitgrain.recipes.spec_model import SchemeModel

# What DESIGN.md promises, as name -> (weight format, weight tile, asymmetric, input format, input tile).
PROMISED = {
    "W8A16": ("int8", per_channel(), False, None, None),
    "W4A16": ("int4", per_group(128), False, None, None),
    "W4A16_ASYM": ("int4", per_group(128), True, None, None),
    "W8A8": ("int8", per_channel(), False, "int8", per_channel()),
    "LLM_INT8": ("int8", per_channel(), False, "int8", per_channel()),
    "LLM_INT8_STATIC": ("int8", per_channel(), False, "int8", per_channel()),
    "W4A8": ("int4", per_group(128), False, "int8", per_channel()),
    "W4AFP8": ("int4", per_group(128), False, "fp8_e4m3", per_channel()),
    "FP8": ("fp8_e4m3", per_tensor(), False, "fp8_e4m3", per_tensor()),
    "FP8_DYNAMIC": ("fp8_e4m3", per_channel(), False, "fp8_e4m3", per_channel()),
    "FP8_BLOCK": ("fp8_e4m3", per_block(128, 128), False, "fp8_e4m3", per_group(128)),
    "NVFP4": ("fp4_e2m1", per_group(16), False, "fp4_e2m1", per_group(16)),
    "MXFP4": ("fp4_e2m1", per_group(32), False, "fp4_e2m1", per_group(32)),
    "W3A16": ("int3", per_group(128), False, None, None),
    "W2A16": ("int2", per_group(128), False, None, None),
    "W4A4": ("int4", per_group(128), False, "int4", per_channel()),
    "TERNARY": ("ternary", per_group(128), False, None, None),
    "W8A16INT16": ("int8", per_channel(), False, "int16", per_channel()),
}


@pytest.mark.parametrize("name", PROMISED)
def test_promised_presets_are_what_their_names_say(name: str):
    weight, tile, asymmetric, given, given_tile = PROMISED[name]
    scheme = get_scheme(name)
    assert scheme.name == name
    assert scheme.weight.format == get_format(weight)
    assert scheme.weight.granularity == tile
    assert scheme.weight.symmetric is not asymmetric
    assert not scheme.weight.dynamic
    assert (scheme.input and scheme.input.format) == (given and get_format(given))
    assert (scheme.input and scheme.input.granularity) == given_tile
    assert scheme.output is None


def test_names_are_case_insensitive_and_dashes_count_as_underscores():
    for name, scheme in PRESETS.items():
        for spelling in (name, name.lower(), name.title(), f" {name.replace('_', '-').lower()} "):
            assert get_scheme(spelling) is scheme
    assert get_scheme("int8") is PRESETS[ALIASES["INT8"]] is PRESETS["W8A8"]


@pytest.mark.parametrize(("typo", "hint"), [("W4A61", "W4A16"), ("nvpf4", "NVFP4"), ("fp8-dynamics", "FP8_DYNAMIC")])
def test_unknown_name_suggests_and_lists_all(typo: str, hint: str):
    with pytest.raises(SchemeError) as caught:
        get_scheme(typo)
    text = str(caught.value)
    assert f"unknown scheme {typo!r}" in text
    assert f"did you mean {hint}?" in text
    assert all(name in text for name in [*PRESETS, *ALIASES])


def test_unknown_name_without_a_near_one_is_readable():
    with pytest.raises(SchemeError, match=r"unknown scheme 'zzz'\. Known schemes: W8A16, "):
        get_scheme("zzz")


def test_only_static_activations_and_columns_by_activation_need_calibration():
    needing = [name for name, scheme in PRESETS.items() if scheme.needs_calibration]
    assert needing == ["LLM_INT8_STATIC", "W8A8_STATIC", "W8A8_RPTQ", "W4A8_RPTQ", "W4A4_RPTQ", "FP8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_scales_follow_the_checkpoint_and_special_ones_stay(dtype: torch.dtype):
    assert get_scheme("W4A16").for_dtype(dtype).weight.scale == get_format(str(dtype).removeprefix("torch."))
    for name in ("W8A8_STATIC", "FP8"):
        inputs = get_scheme(name).for_dtype(dtype).input
        assert inputs is not None
        assert inputs.scale == get_format(str(dtype).removeprefix("torch."))
    assert get_scheme("W8A8").for_dtype(dtype).input == get_scheme("W8A8").input  # computed, not stored
    for name in ("MXFP4", "NVFP4"):
        assert get_scheme(name).for_dtype(dtype) == get_scheme(name)
    assert get_scheme("W4A16").for_dtype(torch.float64).weight.scale == get_format("float32")


def test_indivisible_names_the_culprit():
    assert get_scheme("W4A16").indivisible(5, 256) is None
    assert get_scheme("W4A16").indivisible(256, 100) == "weight per_group(128) does not divide 100 input features"
    assert get_scheme("W8A8").indivisible(7, 13) is None
    assert get_scheme("FP8_BLOCK").indivisible(100, 256) is None  # blocks may be cut at the last rows
    assert get_scheme("FP8_BLOCK").indivisible(128, 100) is not None
    own = Scheme("own", get_scheme("W8A16").weight, get_scheme("MXFP4").input)
    assert own.indivisible(4, 48) == "input per_group(32) does not divide 48 input features"


def test_what_a_file_type_prescribes_stays():
    for name, spec in GGUF_TYPES.items():
        scheme = get_scheme(f"gguf-{name}")
        assert scheme.prescribed
        assert scheme.for_dtype(torch.bfloat16).weight == scheme.weight == spec
        assert SchemeModel.of(scheme).build() == scheme
    assert get_scheme("GGUF_Q4_K").indivisible(3, 512) is None
    assert get_scheme("GGUF_Q4_0").indivisible(3, 288) is None
    assert get_scheme("GGUF_Q4_K").indivisible(3, 288) == "blocks of 256 weights do not divide 288 input features"


@pytest.mark.parametrize("name", PRESETS)
def test_by_channel_fits_every_width_or_says_why_not(name: str):
    scheme = PRESETS[name]
    if scheme.weight.format == get_format("fp4_e2m1") and not scheme.prescribed:
        with pytest.raises(SchemeError, match=rf"{name}: FP4 exists only in groups.*--on-indivisible skip"):
            scheme.by_channel()
        return
    if scheme.prescribed:
        with pytest.raises(SchemeError, match=rf"{name} exists only in blocks.*--on-indivisible skip"):
            scheme.by_channel()
        return
    channel = scheme.by_channel()
    assert channel.name == f"{name}/channel"
    assert channel.indivisible(3, 7) is None
    assert channel.weight == replace(scheme.weight, granularity=per_channel())
    if scheme.input is None:
        assert channel.input is None
    elif scheme.input.dynamic:
        assert channel.input == replace(scheme.input, granularity=per_channel())
    else:
        assert channel.input == scheme.input  # no static scale for each token: tokens are not known beforehand


def test_int8_grids_are_symmetric_where_engines_multiply_codes():
    for name in ("W8A8", "W8A8_STATIC", "INT8_TENSOR"):
        scheme = PRESETS[name]
        for spec in (scheme.weight, scheme.input):
            assert isinstance(spec, QuantSpec)
            assert (spec.low, spec.high) == (-127, 127)
            assert spec.format == IntFormat(8)
