"""The AWQ layout: what is written means the same to a reader of the documented layout, and comes back as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented_dequantizers import AWQ_FIELDS, awq_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_gptq_layout import any_tensor, layer_of, spec_of

from bitgrain.checkpoints.awq import AWQ
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.layouts import layout_of
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_tensor
from random_specs import LAWS, same

LAYOUT = AWQ()


@st.composite
def cases(draw: Any) -> tuple[StoredLayer, QTensor]:
    spec = spec_of(
        4,
        draw(st.sampled_from([None, 8, 16])),
        zero_point=draw(st.sampled_from(["none", "integer"])),
        scale=draw(st.sampled_from([get_format("float16"), get_format("bfloat16")])),
    )
    shape = (8 * draw(st.integers(1, 5)), 16 * draw(st.integers(1, 4)))
    return layer_of(spec, *shape), any_tensor(spec, shape, draw(st.integers(0, 2**31)))


def test_any_layer_means_the_same_to_a_documented_reader_and_comes_back():
    @settings(LAWS, max_examples=40)
    @given(cases())
    def law(case: tuple[StoredLayer, QTensor]):
        layer, q = case
        assert LAYOUT.refusal(layer) is None
        stored = LAYOUT.encode(layer, [q])
        found = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
        assert found == LAYOUT.tensors(layer)
        assert all(tensor.is_contiguous() for tensor in stored.values())
        plain = {name.removeprefix("m.up."): tensor for name, tensor in stored.items()}
        theirs = awq_weight(plain, q.spec.granularity.tile(layer.shape)[1])
        assert np.array_equal(theirs, q.dequantize(torch.float64).numpy())
        (back,), (packed,) = LAYOUT.decode(layer, stored.__getitem__), LAYOUT.decode_packed(layer, stored.__getitem__)
        assert same(back, q)
        assert same(packed.unpack(), q)

    law()


def test_the_order_of_the_fields():
    spec = spec_of(4)
    codes = torch.arange(-8, 0, dtype=torch.int8).view(8, 1).repeat(1, 8)
    q = QTensor(codes, torch.ones(8, 1, dtype=torch.float16), None, spec)
    words = LAYOUT.encode(layer_of(spec, 8, 8), [q])["m.up.qweight"].view(-1)
    assert words.tolist() == [sum(place << 4 * field for field, place in enumerate(AWQ_FIELDS))] * 8


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (spec_of(4, 32, scale=get_format("float32")), {}, "quantize --layout awq` chooses"),
        (spec_of(8, 32), {}, "int4 with or without integer zero points, not int8"),
        (spec_of(4, 32, ordered=True), {}, "no order of the columns"),
        (spec_of(4, 32, zero_point="real"), {}, "int4 with or without integer zero points"),
        (QuantSpec(get_format("int4"), per_tensor(), scale=get_format("float16")), {}, "not per_tensor"),
        (spec_of(4, 48), {}, "whole groups: m.up is (64, 64), per_group(48)"),
        (spec_of(4, 32), {"out_features": 60}, "outputs in eights"),
        (spec_of(4), {"transposed": True, "class_name": "Conv1D"}, "m.up is stored as [in, out] (Conv1D)"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(spec: QuantSpec, changes: dict[str, Any], words: str):
    reason = LAYOUT.refusal(layer_of(spec, **changes))
    assert reason is not None
    assert words in reason


def test_groups_of_two_sizes_are_refused():
    layers = [layer_of(spec_of(4, group), name=f"m.{group}") for group in (32, 64)]
    with pytest.raises(SchemeError, match=r"one group size for all layers, not 32 \(m.32\), 64 \(m.64\)"):
        LAYOUT.config(layers, [])


def write(folder: Path, **changes: Any) -> tuple[QTensor, Any]:
    """A checkpoint of one layer, its weight and its config.json."""
    spec = spec_of(4, 32, zero_point="integer")
    layer, q = layer_of(spec), any_tensor(spec, (64, 64), 1)
    kept = {"m.kept.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    save_file(LAYOUT.encode(layer, [q]) | kept, folder / "model.safetensors")
    own = LAYOUT.config([layer], [("m.kept", "m.kept", "Linear")])
    return q, {"quantization_config": own | changes}


@pytest.mark.parametrize(
    "changes",
    [{}, {"version": "GEMM"}, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "version": "1"}],
)
def test_a_checkpoint_is_read_back(changes: dict[str, Any], tmp_path: Path):
    q, config = write(tmp_path, **changes)
    assert config["quantization_config"]["modules_to_not_convert"] == ["m.kept"]
    layout, checkpoint = layout_of(config), open_checkpoint(tmp_path)
    assert isinstance(layout, AWQ)
    (layer,) = layout.read_layers(config, checkpoint)
    assert (layer.module, layer.shape, layer.dtype) == ("m.up", (64, 64), torch.bfloat16)
    assert same(layout.decode(layer, checkpoint.read)[0], replace(q, spec=layer.scheme.weight))


def test_layers_of_auto_round_have_groups_of_their_own(tmp_path: Path):
    specs = {"m.up": spec_of(4, 32, zero_point="integer"), "m.down": spec_of(4, 64, zero_point="integer")}
    tensors: dict[str, torch.Tensor] = {"m.kept.weight": torch.zeros(4, 4, dtype=torch.float16)}
    for name, spec in specs.items():
        tensors |= LAYOUT.encode(layer_of(spec, name=name), [any_tensor(spec, (64, 64), 1)])
    save_file(tensors, tmp_path / "model.safetensors")
    own = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    more = {"extra_config": {"m.down": {"group_size": 64}}}
    found = LAYOUT.read_layers({"quantization_config": own | more}, open_checkpoint(tmp_path))
    assert {layer.module: layer.scheme.weight for layer in found} == specs
    with pytest.raises(CheckpointError, match="AWQ with 2 bits"):
        LAYOUT.read_layers({"quantization_config": own | {"bits": 2}}, open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"bits": 3}, "AWQ with 3 bits"),
        ({"bits": None}, "AWQ with None bits"),
        ({"version": "gemv"}, "AWQ in version 'gemv'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "32"}, "group_size '32'"),
        ({"group_size": 48}, "groups of 48 do not divide its 64 inputs"),
        ({"group_size": -1}, "qzeros is torch.int32"),
    ],
)
def test_a_config_that_lies_is_an_error(lie: dict[str, Any], words: str, tmp_path: Path):
    _, config = write(tmp_path, **lie)
    with pytest.raises(CheckpointError, match=words):
        LAYOUT.read_layers(config, open_checkpoint(tmp_path))


@pytest.mark.parametrize("lost", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("lie", ["lost", "shape", "dtype", "rank"])
def test_a_tensor_that_is_missing_or_wrong_is_an_error(lost: str, lie: str, tmp_path: Path):
    q, config = write(tmp_path)
    tensors = LAYOUT.encode(layer_of(q.spec), [q])
    wrong = tensors.pop(f"m.up.{lost}")
    if lie != "lost":
        wrong = {"shape": wrong[1:], "dtype": wrong.to(torch.int64), "rank": wrong.unsqueeze(0)}[lie]
        tensors[f"m.up.{lost}"] = wrong.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    if (lost, lie) == ("qweight", "lost"):  # then nothing says that there is a layer
        assert LAYOUT.read_layers(config, open_checkpoint(tmp_path)) == []
        return
    with pytest.raises(CheckpointError, match=r"m\.up"):
        LAYOUT.read_layers(config, open_checkpoint(tmp_path))
