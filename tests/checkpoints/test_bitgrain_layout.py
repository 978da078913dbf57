"""The bitgrain layout holds any QuantSpec on any stack of matrices, and gives back every bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout, read_layers
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.numerics import QuantSpec, get_format, per_group, per_tensor
from bitgrain.numerics.spec import nf4_double_quantized
from bitgrain.recipes import PRESETS, Scheme
from random_specs import LAWS, any_scheme, layers, quantized_parts, same, same_inputs, static_inputs

LAYOUT = BitgrainLayout()


def round_trip(layer: StoredLayer, seed: int) -> None:
    parts = quantized_parts(layer, seed)
    inputs = static_inputs(layer, seed)
    stored = LAYOUT.encode(layer, parts, inputs)
    found = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
    assert sorted(found, key=lambda spec: spec.name) == sorted(LAYOUT.tensors(layer), key=lambda spec: spec.name)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    back = LAYOUT.decode(layer, stored.__getitem__)
    assert len(back) == layer.experts
    assert same_inputs(LAYOUT.decode_inputs(layer, stored.__getitem__), inputs)
    assert all(same(a, b) for a, b in zip(parts, back, strict=True))
    assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(parts, back, strict=True))


@LAWS
@given(layers(any_scheme()), st.integers(0, 2**31))
def test_decode_undoes_encode_and_tensors_predicts_it(layer: StoredLayer, seed: int):
    if LAYOUT.refusal(layer) is None:
        round_trip(layer, seed)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("experts", [1, 3])
def test_every_preset_on_odd_sizes(name: str, experts: int):
    layer = StoredLayer(
        *("h.0.mlp.weight", "h.0.mlp", "h.0.mlp", "Conv1D", "linear", 5, 131, experts, True, torch.bfloat16),
        PRESETS[name].for_dtype(torch.bfloat16),
    )
    if name.endswith("_RPTQ") and experts > 1:
        assert "clusters of the input channels of stacked experts" in str(LAYOUT.refusal(layer))
        return
    assert LAYOUT.refusal(layer) is None
    round_trip(layer, 1)


def test_double_quantized_nf4_with_zero_points_of_scales():
    layer = StoredLayer("a.weight", "a", "a", "Linear", "linear", 7, 100, 2, False, torch.float32,
                        Scheme("NF4", nf4_double_quantized(16)))  # fmt: skip
    assert {spec.name for spec in LAYOUT.tensors(layer)} == {
        "a.weight.codes", "a.weight.scale", "a.weight.outer_scale", "a.weight.outer_zero"
    }  # fmt: skip
    round_trip(layer, 2)


@LAWS
@given(st.lists(layers(any_scheme()), min_size=1, max_size=4))
def test_config_tells_the_reader_everything(drawn: list[StoredLayer]):
    named = [
        replace(layer, tensor=f"m.{i}.weight", module=f"m.{i}", memory_module=f"mem.{i}")
        for i, layer in enumerate(drawn)
    ]
    config = LAYOUT.config(named, [("lm_head", "lm_head", "Linear")])
    assert config["quant_method"] == "bitgrain"
    assert config["ignore"] == ["lm_head"]
    assert read_layers(config) == named


def test_refusals_name_the_layer():
    base = StoredLayer("m.conv.weight", "m.conv", "m.conv", "Conv2d", "conv", 4, 9, 1, False, torch.float32,
                       PRESETS["W8A16"])  # fmt: skip
    assert LAYOUT.refusal(base) is None
    assert "m.conv is a transposed convolution" in str(LAYOUT.refusal(replace(base, transposed=True)))
    int8 = get_format("int8")
    once = QuantSpec(int8, per_tensor())
    twice = QuantSpec(int8, per_group(4), scale=QuantSpec(get_format("fp8_e4m3"), per_tensor(), scale=once))
    deep = replace(base, role="linear", scheme=Scheme("deep", twice))
    assert "m.conv: scales of scales of scales" in str(LAYOUT.refusal(deep))
    wide = QuantSpec(int8, per_group(4), scale=QuantSpec(get_format("int16"), per_tensor()))
    few = replace(base, role="linear", scheme=PRESETS["W8A8_RPTQ"])
    assert LAYOUT.refusal(few) == "m.conv: 32 clusters of 9 input channels; ask for at most 9"
    assert "more than 8 bits" in str(LAYOUT.refusal(replace(base, role="linear", scheme=Scheme("wide", wide))))
