"""GPTQ layouts: what is written means the same to a reader of the documented layout, and comes back as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented_dequantizers import gptq_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitgrain.checkpoints.gptq import GPTQ
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.layouts import layout_of
from bitgrain.checkpoints.linear_layers import linear_layer
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError
from bitgrain.numerics import Granularity, IntFormat, QTensor, QuantSpec, get_format, per_channel, per_group, per_tensor
from bitgrain.recipes import PRESETS
from random_specs import LAWS, same

V1, V2 = GPTQ(1), GPTQ(2)
FP16 = get_format("float16")


def any_tensor(spec: QuantSpec, shape: tuple[int, int], seed: int, low: int | None = None) -> QTensor:
    """Any codes, scales, zero points and order; zero points from `low`."""
    draw = torch.Generator().manual_seed(seed)
    half = 2 ** (spec.format.bits - 1)
    tiles = spec.granularity.tiles(shape)
    codes = torch.randint(-half, half, shape, generator=draw).to(torch.int8)
    scale = (torch.rand(tiles, generator=draw) * 0.1 + 1e-3).to(spec.scale.torch_dtype)
    zero = None
    if not spec.symmetric:
        zero = torch.randint(-half if low is None else low, half, tiles, generator=draw).to(torch.int8)
    order = torch.randperm(shape[1], generator=draw).to(torch.int32) if spec.ordered else None
    return QTensor(codes, scale, zero, spec, order=order)


def layer_of(spec: QuantSpec, out: int = 64, into: int = 64, name: str = "m.up", **changes: Any) -> StoredLayer:
    return replace(linear_layer(name, out, into, spec, torch.float16), **changes)


def spec_of(bits: int, group: int | None = None, **more: Any) -> QuantSpec:
    granularity = per_channel() if group is None else per_group(group)
    return QuantSpec(IntFormat(bits), granularity, **({"scale": FP16} | more))


@st.composite
def cases(draw: Any) -> tuple[StoredLayer, QTensor]:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    group = draw(st.sampled_from([None, 8, 16, 32]))
    spec = spec_of(
        bits,
        group,
        zero_point=draw(st.sampled_from(["none", "integer"])),
        scale=draw(st.sampled_from([FP16, get_format("bfloat16")])),
        ordered=group is not None and draw(st.booleans()),
    )
    shape = (32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 3)))
    return layer_of(spec, *shape), any_tensor(spec, shape, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("layout", [V1, V2], ids=lambda layout: layout.name)
def test_any_layer_means_the_same_to_a_documented_reader_and_comes_back(layout: GPTQ):
    @settings(LAWS, max_examples=40)
    @given(cases())
    def law(case: tuple[StoredLayer, QTensor]):
        layer, q = case
        assert layout.refusal(layer) is None
        stored = layout.encode(layer, [q])
        found = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
        assert found == layout.tensors(layer)
        assert all(tensor.is_contiguous() for tensor in stored.values())
        plain = {name.removeprefix("m.up."): tensor for name, tensor in stored.items()}
        theirs = gptq_weight(plain, q.spec.format.bits, layout.version)
        assert np.array_equal(theirs, q.dequantize(torch.float64).numpy())
        (back,) = layout.decode(layer, stored.__getitem__)
        assert torch.equal(back.dequantize(), q.dequantize())
        assert q.spec.ordered or same(back, q)
        again = layout.encode(layer, [back])
        assert all(torch.equal(again[name], stored[name]) for name in stored)

    law()


def test_v1_is_v2_with_one_less_in_each_zero_point():
    spec = spec_of(4, 32, zero_point="integer")
    q = any_tensor(spec, (64, 64), 1, low=-7)
    first, second = (layout.encode(layer_of(spec), [q])["m.up.qzeros"] for layout in (V1, V2))
    assert torch.equal(second - first, torch.full_like(first, 0x11111111))
    spec = spec_of(4, 32)
    q = any_tensor(spec, (64, 64), 1)
    first, second = (layout.encode(layer_of(spec), [q])["m.up.qzeros"] for layout in (V1, V2))
    assert bool((first == 0x77777777).all())
    assert bool((second == -0x77777778).all())


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (spec_of(4, 32, scale=get_format("float32")), {}, "quantize --layout gptq` chooses"),
        (spec_of(5, 32), {}, "integers of 2, 3, 4 and 8 bits, not int5"),
        (QuantSpec(get_format("uint4"), per_group(32), zero_point="integer", scale=FP16), {}, "not uint4"),
        (spec_of(4, 32, zero_point="real"), {}, "zero points that are codes"),
        (QuantSpec(IntFormat(4), per_tensor(), scale=FP16), {}, "per channel or per group, not per_tensor"),
        (QuantSpec(IntFormat(4), Granularity(2, 32), scale=FP16), {}, "per channel or per group, not per_block"),
        (spec_of(4, 48), {}, "per_group(48) does not divide the 64 inputs of m.up"),
        (spec_of(4), {"in_features": 40}, "m.up is (64, 40), codes of 4 bits do not fill them"),
        (spec_of(3), {"out_features": 40}, "m.up is (40, 64), codes of 3 bits do not fill them"),
        (spec_of(4), {"transposed": True, "class_name": "Conv1D"}, "m.up is stored as [in, out] (Conv1D)"),
        (spec_of(4), {"experts": 4}, "m.up stacks 4 experts"),
        (spec_of(4), {"role": "embedding", "class_name": "Embedding"}, "linear layers, m.up is Embedding"),
        (spec_of(4, outliers=0.1), {}, "no place for outliers"),
        (spec_of(8), {"scheme": PRESETS["W8A8"]}, "no form for quantized activations"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(spec: QuantSpec, changes: dict[str, Any], words: str):
    reason = V1.refusal(layer_of(spec, **changes))
    assert reason is not None
    assert words in reason


def write(folder: Path, layers: dict[str, tuple[StoredLayer, QTensor]], layout: GPTQ = V1, **config: Any) -> Any:
    """A checkpoint of these layers and one kept matrix; its config.json."""
    tensors = {name: tensor for layer, q in layers.values() for name, tensor in layout.encode(layer, [q]).items()}
    tensors["m.kept.weight"] = torch.zeros(4, 4, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    own = layout.config([layer for layer, _ in layers.values()], [("m.kept", "m.kept", "Linear")])
    return {"quantization_config": own | config}


def read_back(folder: Path, config: Any) -> dict[str, StoredLayer]:
    layout = layout_of(config)
    assert layout is not None
    return {layer.module: layer for layer in layout.read_layers(config, open_checkpoint(folder))}


@pytest.mark.parametrize("layout", [V1, V2], ids=lambda layout: layout.name)
def test_layers_that_differ_are_told_and_read(layout: GPTQ, tmp_path: Path):
    specs = {
        "m.0.q_proj": spec_of(4, 32),
        "m.1.q_proj": spec_of(4, 32),
        "m.10.q_proj": spec_of(8, None, zero_point="integer"),
        "m.0.down_proj": spec_of(4, 32, ordered=True),
        "m.1.down_proj": spec_of(3, 16, scale=get_format("bfloat16")),
        "lm_head": spec_of(8, 64),
    }
    layers = {
        name: (
            layer_of(spec, name=name, role="lm_head" if name == "lm_head" else "linear"),
            any_tensor(spec, (64, 64), i),
        )
        for i, (name, spec) in enumerate(specs.items())
    }
    config = write(tmp_path, layers, layout)
    own = config["quantization_config"]
    assert (own["bits"], own["group_size"], own["sym"], own["desc_act"], own["lm_head"]) == (4, 32, True, False, True)
    assert {key for key in own["dynamic"] if key.startswith("-:")} == {r"-:m\.kept$"}
    assert own["dynamic"][r"m\.10\.(?:q_proj|qkv_proj)$"] == {"bits": 8, "group_size": -1, "sym": False}
    found = read_back(tmp_path, config)
    assert {name: layer.scheme.weight for name, layer in found.items()} == specs
    assert all(layer.dtype == torch.float16 for layer in found.values())
    checkpoint = open_checkpoint(tmp_path)
    for name, (_, q) in layers.items():
        (back,) = layout.decode(found[name], checkpoint.read)
        assert torch.equal(back.dequantize(), q.dequantize())


def test_an_order_that_is_none_and_an_order_without_g_idx(tmp_path: Path):
    spec = spec_of(4, 32)
    config = write(tmp_path, {"m.up": (layer_of(spec), any_tensor(spec, (64, 64), 1))}, desc_act=True)
    assert read_back(tmp_path, config)["m.up"].scheme.weight == spec
    ordered = spec_of(4, 32, ordered=True)
    config = write(tmp_path, {"m.up": (layer_of(ordered), any_tensor(ordered, (64, 64), 1))}, desc_act=False)
    with pytest.raises(CheckpointError, match=r"m\.up\.g_idx orders the inputs"):
        read_back(tmp_path, config)


def test_files_of_auto_round(tmp_path: Path):
    specs = {"m.up": spec_of(4, 32), "m.up_2": spec_of(8, 32), "m.5.q": spec_of(2, 32)}
    layers = {name: (layer_of(spec, name=name), any_tensor(spec, (64, 64), 3)) for name, spec in specs.items()}
    more = {"m.up_2": {"bits": 8}, r".*\.5\..*": {"bits": 2, "act_bits": None}, "m.other": {"bits": 16}}
    for layout, packing in ((V1, "auto_round:auto_gptq"), (V2, "auto_round")):
        write(tmp_path, layers, layout)
        own = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": packing}
        config = {"quantization_config": own | {"extra_config": more}}
        assert layout_of(config) is not None
        assert layout_of(config).name == layout.name
        assert {name: layer.scheme.weight for name, layer in read_back(tmp_path, config).items()} == specs


def test_zero_points_of_a_symmetric_file_are_seen(tmp_path: Path):
    spec = spec_of(4, 32, zero_point="integer")
    config = write(tmp_path, {"m.up": (layer_of(spec), any_tensor(spec, (64, 64), 1))}, sym=True)
    layer = read_back(tmp_path, config)["m.up"]
    with pytest.raises(CheckpointError, match=r"m\.up\.qzeros: config\.json says sym"):
        V1.decode(layer, open_checkpoint(tmp_path).read)


@pytest.mark.parametrize("groups", [[0] * 64, [5] * 64, [-1] * 64, [0] * 33 + [1] * 31])
def test_an_order_that_does_not_fill_the_groups_is_an_error(groups: list[int], tmp_path: Path):
    spec = spec_of(4, 32)
    layer, q = layer_of(spec), any_tensor(spec, (64, 64), 1)
    config = write(tmp_path, {"m.up": (layer, q)}, desc_act=True)
    tensors = V1.encode(layer, [q]) | {"m.up.g_idx": torch.tensor(groups, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_back(tmp_path, config)["m.up"]
    with pytest.raises(CheckpointError, match=r"m\.up\.g_idx does not put 32 inputs into each group"):
        V1.decode(found, open_checkpoint(tmp_path).read)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"bits": 5}, "codes of 5 bits"),
        ({"bits": "4"}, "codes of '4' bits"),
        ({"bits": True}, "codes of True bits"),
        ({"bits": 8}, "qweight is torch.int32"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 48}, "groups of 48 do not divide its 64 inputs"),
        ({"group_size": 16}, "qzeros is torch.int32 .2, 8.; config.json means torch.int32 .4, 8."),
        ({"sym": "yes"}, "sym and desc_act of m.up are 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not known"),
        ({"dynamic": []}, None),
        ({"dynamic": ["m.up"]}, "dynamic is no table"),
        ({"dynamic": {"m.up": 8}}, "dynamic is no table"),
        ({"dynamic": {"-:m": {}}}, "m.up is quantized, but quantization_config says it is not"),
        ({"dynamic": {"(": {}}}, "is no regular expression"),
        ({"dynamic": {"(m|m)*x": {}}}, "repeats groups"),
        ({"dynamic": {"m" * 600: {}}}, "too long"),
    ],
)
def test_a_config_that_lies_is_an_error(lie: dict[str, Any], words: str | None, tmp_path: Path):
    spec = spec_of(4, 32)
    config = write(tmp_path, {"m.up": (layer_of(spec), any_tensor(spec, (64, 64), 1))}, **lie)
    if words is None:
        assert list(read_back(tmp_path, config)) == ["m.up"]
    else:
        with pytest.raises(CheckpointError, match=words):
            read_back(tmp_path, config)


@pytest.mark.parametrize("lost", ["qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("lie", ["lost", "shape", "dtype", "rank"])
def test_a_tensor_that_is_missing_or_wrong_is_an_error(lost: str, lie: str, tmp_path: Path):
    spec = spec_of(4, 32)
    layer, q = layer_of(spec), any_tensor(spec, (64, 64), 1)
    config = write(tmp_path, {"m.up": (layer, q)})
    tensors = V1.encode(layer, [q])
    name = f"m.up.{lost}"
    wrong = tensors.pop(name)
    if lie != "lost":
        wrong = {"shape": wrong[1:], "dtype": wrong.to(torch.int64), "rank": wrong.unsqueeze(0)}[lie]
        tensors[name] = wrong.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    if (lost, lie) == ("g_idx", "lost"):  # auto-round leaves it out
        assert list(read_back(tmp_path, config)) == ["m.up"]
        return
    with pytest.raises(CheckpointError, match=r"m\.up"):
        read_back(tmp_path, config)


def test_qweight_that_is_no_matrix_is_an_error(tmp_path: Path):
    spec = spec_of(4, 32)
    layer, q = layer_of(spec), any_tensor(spec, (64, 64), 1)
    config = write(tmp_path, {"m.up": (layer, q)})
    for wrong in (torch.zeros(8, dtype=torch.int32), torch.zeros(8, 64, 1, dtype=torch.int32), torch.zeros(0, 64)):
        save_file(V1.encode(layer, [q]) | {"m.up.qweight": wrong}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"m\.up\.qweight"):
            read_back(tmp_path, config)
