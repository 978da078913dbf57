"""What the layout accepts, the compressed-tensors library decodes to the same bits; the rest it refuses."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.compressed_tensors_reader import read_layers
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError
from bitgrain.numerics import QuantSpec, get_format, per_block, per_channel, per_group, per_row_group, per_tensor
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.ranges import MinMax
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS, Scheme
from random_specs import ASYMMETRIC_INPUT, LAWS, any_scheme, layers, quantized_parts, same, same_inputs, static_inputs

LAYOUT = CompressedTensors()
OWN = ("W8A16INT16", "LLM_INT8", "LLM_INT8_STATIC", "NF4", "NF4_BNB", "FP4_BNB", "W4A4", "TERNARY")
WRITABLE = [name for name in PRESETS if name not in OWN and not name.endswith("_RPTQ") and "GGUF" not in name]


def layer_of(scheme: Scheme, out: int = 128, into: int = 256, **changes: Any) -> StoredLayer:
    dtype = changes.pop("dtype", torch.bfloat16)
    base = StoredLayer("m.up.weight", "m.up", "m.up", "Linear", "linear", out, into, 1, False, dtype,
                       scheme.for_dtype(dtype))  # fmt: skip
    return replace(base, **changes)


def library_decodes(layer: StoredLayer, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight as the library's own compressor makes it, from our config and our tensors."""
    config = LAYOUT.config([layer], [])
    plain = {key: value for key, value in config.items() if key not in ("version", "dequantize")}
    (group,) = QuantizationConfig.model_validate(plain).config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(group.format)
    local = {name.removeprefix(f"{layer.module}."): tensor for name, tensor in stored.items()}
    return compressor.decompress(local, group)["weight"]


def check(layer: StoredLayer, seed: int) -> None:
    parts = quantized_parts(layer, seed)
    inputs = static_inputs(layer, seed)
    stored = LAYOUT.encode(layer, parts, inputs)
    found = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
    assert sorted(found, key=lambda spec: spec.name) == sorted(LAYOUT.tensors(layer), key=lambda spec: spec.name)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    (back,) = LAYOUT.decode(layer, stored.__getitem__)
    assert same(back, parts[0])
    assert same_inputs(LAYOUT.decode_inputs(layer, stored.__getitem__), inputs)
    theirs = library_decodes(layer, stored)
    # the library decodes FP4 to bfloat16, everything else to the dtype of the scale
    fp4 = layer.scheme.weight.format == get_format("fp4_e2m1")
    stored = torch.float16 if layer.scheme.prescribed else layer.dtype
    assert theirs.dtype == (torch.bfloat16 if fp4 else stored)
    assert torch.equal(theirs, parts[0].dequantize(theirs.dtype))


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("shape", [(128, 256), (1, 384), (200, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_presets_are_decoded_alike_by_the_library(name: str, shape: tuple[int, int], dtype: torch.dtype):
    layer = layer_of(PRESETS[name], *shape, dtype=dtype)
    assert LAYOUT.refusal(layer) is None
    check(layer, 3)


@pytest.mark.parametrize("format", ["int4", "uint4"])
def test_minima_are_refused(format: str):
    spec = QuantSpec(get_format(format), per_group(32), zero_point="minimum", scale=FP16, minimum=FP16)
    assert "no format for weights" in (LAYOUT.refusal(layer_of(Scheme("own", spec))) or "")


@pytest.mark.parametrize("name", ["W8A16", "W8A8", "W4A16_CHANNEL", "INT8_TENSOR", "FP8_DYNAMIC", "W8A16_TENSOR"])
@pytest.mark.parametrize("into", [1, 3, 33, 100, 131])
def test_odd_numbers_of_inputs(name: str, into: int):
    check(layer_of(PRESETS[name], 5, into), 4)


near_schemes = st.builds(
    lambda spec, given: Scheme("own", spec, given),
    st.builds(
        QuantSpec,
        st.sampled_from([get_format(name) for name in (*(f"int{bits}" for bits in range(2, 9)), "fp8_e4m3")]),
        st.sampled_from([per_tensor(), per_channel(), per_group(8), per_group(32), per_block(8, 8), per_block(16, 32)]),
        scale=st.sampled_from([get_format("float32"), get_format("fp8_e4m3"), get_format("e8m0")]),
    )
    | st.builds(
        QuantSpec,
        st.sampled_from([get_format(f"int{bits}") for bits in range(1, 9)]),
        st.sampled_from([per_channel(), per_group(8), per_group(32), per_tensor()]),
        zero_point=st.just("integer"),
    ),
    st.sampled_from(
        [None, ASYMMETRIC_INPUT, *(PRESETS[name].input for name in ("W8A8", "FP8_DYNAMIC", "MXFP4", "FP8"))]
    ),
)
"""Schemes at the border of what compressed-tensors can hold."""
fitting = st.sampled_from([32, 64, 96]).flatmap(
    lambda into: layers(near_schemes, in_features=into, experts=1, transposed=False)
)


def test_whatever_is_accepted_is_decoded_alike():
    accepted: set[str] = set()
    refused: set[str] = set()

    @settings(LAWS, max_examples=150)
    @given(st.one_of(fitting, fitting, layers(any_scheme())), st.integers(0, 2**31))
    def law(layer: StoredLayer, seed: int):
        reason = LAYOUT.refusal(layer)
        if reason is None:
            check(layer, seed)
        else:
            assert layer.module in reason
        (accepted if reason is None else refused).add(layer.scheme.weight.describe())

    law()
    assert min(len(accepted), len(refused)) >= 8


def single(name: str, granularity: Any, **more: Any) -> Scheme:
    return Scheme("own", QuantSpec(get_format(name), granularity, **more))


def static_scheme(name: str, granularity: Any, **more: Any) -> Scheme:
    return Scheme("own", PRESETS["W8A8"].weight, QuantSpec(get_format(name), granularity, **more))


@pytest.mark.parametrize(
    ("scheme", "changes", "words"),
    [
        (PRESETS["W4A16"], {"in_features": 100}, "per_group(128) does not divide the 100 inputs of m.up"),
        (PRESETS["W4A16"], {"transposed": True, "class_name": "Conv1D"}, "m.up is stored as [in, out] (Conv1D)"),
        (PRESETS["W4A16"], {"experts": 4, "role": "expert"}, "m.up stacks 4 experts in one tensor"),
        (PRESETS["W4A16"], {"role": "embedding", "class_name": "Embedding"}, "linear layers, m.up is Embedding"),
        (PRESETS["W4A16"], {"role": "conv", "class_name": "Conv1d"}, "linear layers, m.up is Conv1d"),
        (PRESETS["W8A16INT16"], {}, "no form for activations int16"),
        (PRESETS["W8A8_RPTQ"], {}, "no form for activations int8 per_tensor asymmetric in 32 clusters of channels"),
        (PRESETS["LLM_INT8"], {}, "no form for activations int8 per_channel dynamic channels from 6 in full precision"),
        (PRESETS["LLM_INT8_STATIC"], {}, "no place for columns in 16 bits of int8 per_channel 2 % of the columns"),
        (static_scheme("fp8_e4m3", per_channel()), {}, "no form for activations fp8_e4m3 per_channel"),
        (static_scheme("int4", per_tensor()), {}, "no form for activations int4 per_tensor"),
        (static_scheme("int8", per_tensor(), zero_point="real"), {}, "no form for activations int8 per_tensor real"),
        (single("nf4", per_group(64)), {}, "no format for weights nf4"),
        (single("uint4", per_group(64)), {}, "no format for weights uint4"),
        (single("int4", per_group(64), scale=get_format("e8m0")), {}, "no format for weights int4"),
        (single("int4", per_group(64), scale=get_format("fp8_e4m3")), {}, "no format for weights int4"),
        (single("int4", per_group(64), zero_point="real"), {}, "no format for weights int4"),
        (single("fp4_e2m1", per_group(32)), {}, "no format for weights fp4_e2m1"),
        (single("int4", per_channel(1)), {}, "no granularity per_channel(1)"),
        (single("int8", per_row_group(4)), {}, "no granularity per_row_group(4)"),
        (single("int4", per_tensor(), zero_point="integer"), {}, "zero points per channel or per group"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(scheme: Scheme, changes: dict[str, Any], words: str):
    reason = LAYOUT.refusal(layer_of(scheme, **changes))
    assert reason is not None
    assert words in reason
    assert "m.up" in reason


def test_config_of_one_scheme_targets_the_class_and_ignores_the_kept():
    layer = layer_of(PRESETS["W8A8"])
    kept = [("lm_head", "lm_head", "Linear"), ("m.gate", "mem.gate", "TopKRouter")]
    config = LAYOUT.config([layer, replace(layer, module="m.down", tensor="m.down.weight")], kept)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head", "m.gate", "mem.gate"]
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "version"})
    group = parsed.config_groups["group_0"]
    assert group.weights is not None
    assert group.weights.num_bits == 8
    assert group.weights.strategy == "channel"
    assert group.input_activations is not None
    assert group.input_activations.dynamic is True
    assert group.input_activations.strategy == "token"


def test_config_of_several_schemes_names_every_layer():
    first = layer_of(PRESETS["W4A16"])
    second = replace(layer_of(PRESETS["W8A16"]), module="m.down", tensor="m.down.weight", memory_module="mem.down")
    third = replace(first, module="m.gate", tensor="m.gate.weight", memory_module="m.gate")
    config = LAYOUT.config([second, first, third], [("lm_head", "lm_head", "Linear")])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["m.up", "m.gate"], ["m.down", "mem.down"]]  # the larger group first
    assert config["ignore"] == []
    assert config["format"] == "pack-quantized"
    mixed = LAYOUT.config([first, replace(second, scheme=PRESETS["W8A8"])], [])
    assert mixed["format"] == "mixed-precision"
    QuantizationConfig.model_validate({k: v for k, v in mixed.items() if k != "version"})


@pytest.mark.parametrize("name", WRITABLE)
def test_transformers_takes_the_config(name: str):
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = LAYOUT.config([layer_of(PRESETS[name])], [("lm_head", "lm_head", "Linear")])
    taken = CompressedTensorsConfig.from_dict(config)
    assert taken.quantization_config is not None
    assert list(taken.quantization_config.config_groups) == ["group_0"]
    assert taken.quantization_config.ignore == ["lm_head"]


class OnDisk:
    """A checkpoint as the reader sees it: entries with shape and dtype, and reads."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.entries = {n: SimpleNamespace(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@LAWS
@given(st.data(), st.integers(0, 2**31))
def test_reader_finds_the_schemes_again(data: Any, seed: int):
    """From config and tensors alone: the same codes, and a spec that decodes them to the same numbers."""
    names = data.draw(st.lists(st.sampled_from(WRITABLE), min_size=1, max_size=3, unique=True))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    members = [
        replace(layer_of(PRESETS[name], data.draw(st.integers(1, 9)) * 16, 128, dtype=dtype),
                tensor=f"m.{i}.weight", module=f"m.{i}", memory_module=f"m.{i}")
        for i, name in enumerate(names)
    ]  # fmt: skip
    parts = {layer.module: quantized_parts(layer, seed)[0] for layer in members}
    tensors = {"norm.weight": torch.ones(4, dtype=dtype)}
    for layer in members:
        tensors |= LAYOUT.encode(layer, [parts[layer.module]], static_inputs(layer, seed))
    found = read_layers(LAYOUT.config(members, []), OnDisk(tensors))  # type: ignore[arg-type]
    assert [layer.module for layer in found] == [layer.module for layer in members]
    for layer, original in zip(found, members, strict=True):
        assert layer.shape == original.shape
        assert layer.dtype == dtype
        given = original.scheme.input  # how a static scale was chosen is not in the file
        assert layer.scheme.input == (given and replace(given, range=MinMax()))
        (q,) = LAYOUT.decode(layer, tensors.__getitem__)
        assert torch.equal(q.dequantize(dtype), parts[layer.module].dequantize(dtype))


def test_reader_refuses_what_it_cannot_place():
    layer = layer_of(PRESETS["W4A16"])
    tensors = LAYOUT.encode(layer, quantized_parts(layer, 0))
    config = LAYOUT.config([layer], [])
    config["config_groups"]["group_0"]["targets"] = ["another"]
    with pytest.raises(CheckpointError, match=r"m\.up is quantized, but no group"):
        read_layers(config, OnDisk(tensors))  # type: ignore[arg-type]
    whole = LAYOUT.config([layer], [])
    gone = {name: tensor for name, tensor in tensors.items() if not name.endswith("packed")}
    with pytest.raises(CheckpointError, match="neither weight nor weight_packed as a matrix"):
        read_layers(whole, OnDisk(gone))  # type: ignore[arg-type]
    wrong = tensors | {"m.up.weight_shape": torch.tensor([1, 256])}
    with pytest.raises(CheckpointError, match="weight_packed has 128 rows"):
        read_layers(whole, OnDisk(wrong))  # type: ignore[arg-type]
    whole["config_groups"]["group_0"]["weights"]["strategy"] = "attn_head"
    with pytest.raises(CheckpointError, match="strategy 'attn_head'"):
        read_layers(whole, OnDisk(tensors))  # type: ignore[arg-type]


def test_block_and_group_strategies_reach_the_config():
    blocks = LAYOUT.config([layer_of(PRESETS["FP8_BLOCK"])], [])["config_groups"]["group_0"]["weights"]
    assert (blocks["strategy"], blocks["block_structure"]) == ("block", [128, 128])
    groups = LAYOUT.config([layer_of(Scheme("own", int_weight(4, 32)))], [])["config_groups"]["group_0"]["weights"]
    assert (groups["strategy"], groups["group_size"], groups["num_bits"]) == ("group", 32, 4)
    own = LAYOUT.config([layer_of(single("fp8_e4m3", per_block(32, 64)))], [])["config_groups"]["group_0"]["weights"]
    assert own["block_structure"] == [32, 64]


def test_act_order_of_older_files_is_read_and_not_written(tmp_path: Path):
    layer = layer_of(PRESETS["W4A16"], 8, 256)
    (q,) = quantized_parts(layer, 1)
    g_idx = torch.tensor([1, 0] * 128, dtype=torch.int32)
    stored = LAYOUT.encode(layer, [q]) | {"m.up.weight_g_idx": g_idx}
    config = LAYOUT.config([layer], [])
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    (read,) = read_layers(config, checkpoint)
    assert read.scheme.weight.ordered
    assert "given up act-order" in str(LAYOUT.refusal(read))
    assert {spec.name for spec in LAYOUT.tensors(read)} == set(stored)
    (back,) = LAYOUT.decode(read, checkpoint.read)
    assert isinstance(q.scale, torch.Tensor)
    meant = q.codes.float() * q.scale.float()[:, g_idx.long()]
    assert torch.equal(back.dequantize(), meant)
    for wrong, words in ((g_idx * 3, "does not put 128 inputs"), (g_idx[:-1], "weight_g_idx is torch.int32")):
        save_file(stored | {"m.up.weight_g_idx": wrong.contiguous()}, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=words):
            LAYOUT.decode(read_layers(config, checkpoint)[0], checkpoint.read)
