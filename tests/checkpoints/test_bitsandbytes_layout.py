"""bitsandbytes' layouts give back every bit, mean what a slow twin reads, and refuse what they cannot hold."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from bitgrain.checkpoints.bitsandbytes import Bitsandbytes4Bit
from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import Format, QTensor, get_format, per_channel, per_group, quantize
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.spec import bnb_4bit
from bitgrain.recipes import PRESETS, Scheme
from random_specs import LAWS, same

FORMATS = {"bnb-nf4": "nf4", "bnb-fp4": "bnb_fp4"}
CONFIG = {"quant_method": "bitsandbytes"}
# bitsandbytes/functional.py, get_4bit_type: in the order of its codes
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [x / 12 for x in (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)]
TABLES = {"bnb-nf4": torch.tensor(NF4), "bnb-fp4": torch.tensor(FP4)}


def layer_of(name: str, rows: int, cols: int, group: int = 64, double: bool = True, **changes: object) -> StoredLayer:
    if name == "bnb-int8":
        weight = replace(PRESETS["LLM_INT8"].weight, scale=FP16)
        scheme = replace(PRESETS["LLM_INT8"], weight=weight)
    else:
        scheme = Scheme("test", bnb_4bit(FORMATS[name], group, double=double))
    fields = {
        **dict.fromkeys(("module", "memory_module"), "a.b"),
        "tensor": "a.b.weight",
        "class_name": "Linear",
        "role": "linear",
        "experts": 1,
        "transposed": False,
        "out_features": rows,
        "in_features": cols,
        "dtype": torch.float32,
        "scheme": scheme,
    }
    return StoredLayer(**{**fields, **changes})  # type: ignore[arg-type]


def part_of(layer: StoredLayer, seed: int) -> QTensor:
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0] *= seed % 3  # rows of zeros, too
    return quantize(weight, layer.scheme.weight)


def slow_4bit(stored: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The documented layout, one weight at a time, in float32."""
    kind = name.removeprefix("bnb-")
    state = json.loads(bytes(stored[f"a.b.weight.quant_state.bitsandbytes__{kind}"].tolist()))
    assert state["shape"] == list(shape)
    absmax = stored["a.b.weight.absmax"]
    if "a.b.weight.nested_absmax" in stored:
        table, outer = stored["a.b.weight.nested_quant_map"], stored["a.b.weight.nested_absmax"]
        products = [table[int(code)] * outer[i // state["nested_blocksize"]] for i, code in enumerate(absmax)]
        absmax = torch.stack(products) + torch.tensor(float(state["nested_offset"]))
    found = torch.empty(math.prod(shape))
    for i in range(len(found)):
        byte = int(stored["a.b.weight"][i // 2, 0])
        code = byte & 15 if i % 2 else byte >> 4
        found[i] = TABLES[name][code] * absmax[i // state["blocksize"]]
    return found.view(shape)


def test_the_tables_are_theirs_to_the_bit():
    assert torch.equal(get_format("nf4").grid(), TABLES["bnb-nf4"])
    assert torch.equal(get_format("bnb_fp4").grid(), TABLES["bnb-fp4"].unique())


@LAWS
@given(
    st.sampled_from(["bnb-nf4", "bnb-fp4", "bnb-int8"]),
    st.tuples(st.integers(1, 9), st.sampled_from([64, 128, 192, 320]), st.sampled_from([32, 64])),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_decode_undoes_encode_and_tensors_predicts_it(name: str, sizes: tuple[int, int, int], double: bool, seed: int):
    layout, layer = LAYOUTS[name], layer_of(name, *sizes, double)
    assert layout.refusal(layer) is None
    q = part_of(layer, seed)
    stored = layout.encode(layer, [q])
    found = {TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}
    assert found == {replace(spec, any_size=False) for spec in layout.tensors(layer)}
    (back,) = layout.decode(layer, stored.__getitem__)
    assert same(q, back)
    assert torch.equal(q.dequantize(), back.dequantize())
    assert torch.equal(layout.decode_packed(layer, stored.__getitem__)[0].unpack().codes, q.codes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("double", [True, False])
def test_a_slow_twin_reads_the_same_numbers(name: str, double: bool):
    layer = layer_of(name, 9, 64 * 30, double=double)  # 270 blocks: runs of 256 end inside a row
    q = part_of(layer, 5)
    stored = LAYOUTS[name].encode(layer, [q])
    assert torch.equal(slow_4bit(stored, name, layer.shape), q.dequantize())


@pytest.mark.parametrize("storage", [BF16, FP16], ids=str)
def test_int8_scales_of_16_bits_come_back_and_dequantize_as_theirs(storage: Format):
    layer = layer_of("bnb-int8", 300, 64)
    scheme = replace(layer.scheme, weight=replace(layer.scheme.weight, scale=storage))
    q = part_of(replace(layer, scheme=scheme), 1)
    stored = LAYOUTS["bnb-int8"].encode(layer, [q])
    assert torch.equal((stored["a.b.SCB"] / 127).view(-1, 1), scale_values(q.scale))
    theirs = q.codes * stored["a.b.SCB"].view(-1, 1) * 7.874015718698502e-3  # bitsandbytes.functional
    if storage == BF16:
        assert torch.equal(theirs, q.dequantize())
    assert torch.allclose(theirs, q.dequantize(), rtol=2.0**-23, atol=0)


def test_refusals():
    nf4, int8 = LAYOUTS["bnb-nf4"], LAYOUTS["bnb-int8"]
    assert "over the ends of the rows" in str(nf4.refusal(layer_of("bnb-nf4", 4, 96)))
    assert "blocks of 32" in str(nf4.refusal(layer_of("bnb-nf4", 4, 96, group=48)))
    assert "holds nf4, not bnb_fp4" in str(nf4.refusal(layer_of("bnb-fp4", 4, 64)))
    assert "stacks 3 experts" in str(nf4.refusal(layer_of("bnb-nf4", 4, 64, experts=3)))
    assert "stored as [in, out]" in str(nf4.refusal(layer_of("bnb-nf4", 4, 64, transposed=True)))
    assert "is Embedding" in str(nf4.refusal(layer_of("bnb-nf4", 4, 64, role="embedding", class_name="Embedding")))
    rounded = layer_of("bnb-nf4", 4, 64)
    with_inputs = replace(rounded.scheme, input=PRESETS["W8A8"].input)
    assert "weight-only" in str(nf4.refusal(replace(rounded, scheme=with_inputs)))
    layer = layer_of("bnb-int8", 4, 64)
    plain = replace(layer.scheme, weight=replace(layer.scheme.weight, scale=FP32))
    assert "exact for scales of 16 bits only" in str(int8.refusal(replace(layer, scheme=plain)))
    assert "choose LLM_INT8" in str(int8.refusal(replace(layer, scheme=replace(layer.scheme, input=None))))
    grouped = replace(layer.scheme, weight=replace(layer.scheme.weight, granularity=per_group(32)))
    assert "a scale for each row" in str(int8.refusal(replace(layer, scheme=grouped)))


def test_spellings_double_quantize_first():
    house = replace(layer_of("bnb-nf4", 4, 64), scheme=PRESETS["NF4"])
    held = [spec for spec in LAYOUTS["bnb-nf4"].spellings(house) if spec != house.scheme.weight]
    assert held == [bnb_4bit("nf4"), bnb_4bit("nf4", double=False)]


def test_several_means_are_refused():
    layer = layer_of("bnb-nf4", 20, 64 * 30)
    q = part_of(layer, 2)
    assert isinstance(q.scale, QTensor)
    assert isinstance(q.scale.minimum, Tensor)
    q.scale.minimum[0, 0] += 1
    with pytest.raises(SchemeError, match="one mean"):
        LAYOUTS["bnb-nf4"].encode(layer, [q])


def stored_nf4(name: str = "bnb-nf4", double: bool = True) -> dict[str, Tensor]:
    layer = layer_of(name, 6, 128, double=double)
    return LAYOUTS[name].encode(layer, [part_of(layer, 4)])


def read(folder: Path, tensors: dict[str, Tensor], **settings: object) -> list[StoredLayer]:
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {**CONFIG, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **settings}}
    layout = next(layout for layout in LAYOUTS.values() if layout.recognises(config))
    return layout.read_layers(config, open_checkpoint(folder))


def test_layers_are_found_with_their_own_spec(tmp_path: Path):
    double, plain = stored_nf4(), stored_nf4(double=False)
    tensors = {**double, **{key.replace("a.b", "c"): tensor for key, tensor in plain.items()}}
    found = {layer.tensor: layer for layer in read(tmp_path, tensors)}
    assert found["a.b.weight"].scheme.weight == bnb_4bit("nf4")
    assert found["c.weight"].scheme.weight == bnb_4bit("nf4", double=False)
    assert found["c.weight"].shape == (6, 128)


def test_another_writer_s_map_is_read_as_it_is(tmp_path: Path):
    tensors = stored_nf4()
    table = tensors["a.b.weight.nested_quant_map"]
    tensors["a.b.weight.nested_quant_map"] = table + torch.linspace(0, 1e-4, 256)
    (layer,) = read(tmp_path, tensors)
    (q,) = LAYOUTS["bnb-nf4"].decode(layer, tensors.__getitem__)
    assert torch.equal(q.dequantize(), slow_4bit(tensors, "bnb-nf4", layer.shape))
    assert "another writer" in str(LAYOUTS["bitgrain"].refusal(layer))
    again = LAYOUTS["bnb-nf4"].encode(layer, [q])
    state = "a.b.weight.quant_state.bitsandbytes__nf4"
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items() if key != state)


def broken(**state: object) -> dict[str, Tensor]:
    tensors = stored_nf4()
    name = "a.b.weight.quant_state.bitsandbytes__nf4"
    old = json.loads(bytes(tensors[name].tolist()))
    text = json.dumps({**old, **state}).encode()
    return {**tensors, name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (broken(shape=[6, 1 << 40]), "shape of a matrix"),
        (broken(shape=[6, 128, 1]), "shape of a matrix"),
        (broken(shape=[12, 128]), "12 x 128 weights"),
        (broken(shape=[8, 96]), "over the ends of its rows"),
        (broken(blocksize=63), "blocksize"),
        (broken(blocksize=[64]), "blocksize"),
        (broken(blocksize=128), "6 of torch.uint8"),
        (broken(dtype=["float32"]), "dtype"),
        (broken(dtype="complex64"), "dtype"),
        (broken(quant_type="fp4"), "quant_type nf4"),
        (broken(nested_blocksize=0), "nested absmax"),
        (broken(nested_blocksize=True), "nested absmax"),
        (broken(nested_offset="0"), "nested absmax"),
        (broken(nested_offset=1e300), "nested absmax"),
        ({**broken(), "a.b.weight.quant_map": torch.arange(16).float()}, "not the table of nf4"),
        ({**broken(), "a.b.weight.nested_quant_map": torch.zeros(256)}, "ascending"),
        ({**broken(), "a.b.weight.nested_absmax": torch.zeros(3)}, "1 of torch.float32"),
        ({k: v for k, v in broken().items() if not k.endswith("weight.absmax")}, "absmax is missing"),
        ({**broken(), "a.b.weight": torch.zeros(192, 1, dtype=torch.bfloat16)}, "two in a uint8"),
        ({**broken(), "a.b.weight.quant_state.bitsandbytes__nf4": torch.full((9,), 91, dtype=torch.uint8)}, "not JSON"),
        ({"a.weight.quant_state.bitsandbytes__af4": torch.zeros(2, dtype=torch.uint8)}, "not af4"),
        ({"a.weight": torch.zeros(2, 2)}, "there are none"),
    ],
)
def test_damaged_4bit_files_are_refused(tensors: dict[str, Tensor], told: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=told):
        read(tmp_path, tensors)


def int8_tensors(**changes: Tensor) -> dict[str, Tensor]:
    layer = layer_of("bnb-int8", 6, 64)
    return {**LAYOUTS["bnb-int8"].encode(layer, [part_of(layer, 4)]), **{f"a.b.{k}": v for k, v in changes.items()}}


def test_int8_is_read_with_the_storage_that_its_scales_had(tmp_path: Path):
    settings = {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 5}
    (layer,) = read(tmp_path, int8_tensors(), **settings)
    assert layer.scheme.weight == replace(PRESETS["LLM_INT8"].weight, scale=FP16)
    assert layer.scheme.input is not None
    assert (layer.scheme.input.threshold, layer.scheme.weight.granularity) == (5.0, per_channel())
    tensors = int8_tensors(SCB=torch.rand(6) + 0.1)
    (layer,) = read(tmp_path, tensors, **settings)
    (q,) = LAYOUTS["bnb-int8"].decode(layer, tensors.__getitem__)
    theirs = q.codes * tensors["a.b.SCB"].view(-1, 1) * 7.874015718698502e-3
    assert torch.allclose(q.dequantize(), theirs, rtol=3e-7, atol=0)
    assert all(torch.equal(LAYOUTS["bnb-int8"].encode(layer, [q])[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "settings", "told"),
    [
        (int8_tensors(SCB=torch.zeros(5)), {}, "6 of torch.float32"),
        (int8_tensors(weight=torch.zeros(6, dtype=torch.int8)), {}, "a matrix is needed"),
        (int8_tensors(weight=torch.zeros(6, 64)), {}, "torch.int8 are needed"),
        (int8_tensors(weight_format=torch.tensor(1, dtype=torch.uint8)), {}, "only rows"),
        (int8_tensors(), {"llm_int8_threshold": "6"}, "no threshold"),
        ({"a.weight": torch.zeros(2, 2)}, {}, "there are none"),
    ],
)
def test_damaged_int8_files_are_refused(
    tensors: dict[str, Tensor], settings: dict[str, object], told: str, tmp_path: Path
):
    with pytest.raises(CheckpointError, match=told):
        read(tmp_path, tensors, **{"load_in_8bit": True, "load_in_4bit": False, **settings})


def test_every_layout_has_its_own_name():
    assert [name for name, layout in LAYOUTS.items() if isinstance(layout, Bitsandbytes4Bit)] == list(FORMATS)
