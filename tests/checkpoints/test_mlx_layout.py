"""MLX's layout gives back every bit, means what MLX and a slow twin read, and refuses what it cannot hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.checkpoints.mlx_reader import MODES
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.checkpoints.shards import TensorSpec
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.numerics import Format, IntFormat, QTensor, QuantSpec, get_format, per_channel, per_group, quantize
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.respell import respell
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS, Scheme
from random_specs import LAWS, same, same_bits

MLX = LAYOUTS["mlx"]
BITS = (2, 3, 4, 5, 6, 8)


def affine(bits: int, group: int, storage: Format) -> QuantSpec:
    return QuantSpec(IntFormat(bits, False), per_group(group), "minimum", scale=storage, minimum=storage)


def layer_of(spec: QuantSpec, rows: int, cols: int, **changes: object) -> StoredLayer:
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
        "scheme": Scheme("test", spec),
    }
    return StoredLayer(**{**fields, **changes})  # type: ignore[arg-type]


def part_of(layer: StoredLayer, seed: int) -> QTensor:
    """Random codes, scales and minima."""
    generator, spec = torch.Generator().manual_seed(seed), layer.scheme.weight
    if spec.symmetric:
        return quantize(torch.randn(layer.shape, generator=generator), spec)
    codes = torch.randint(0, 2**spec.format.bits, layer.shape, generator=generator, dtype=torch.uint8)
    dtype = getattr(torch, spec.scale_format.name)
    scale, minimum = (torch.randn(spec.granularity.tiles(layer.shape), generator=generator).to(dtype) for _ in "ab")
    return QTensor(codes, scale, None, spec, minimum=minimum)


def slow(words: Tensor, bits: int, cols: int) -> np.ndarray[Any, Any]:
    """Codes out of a little-endian stream of bits, one by one."""
    found = np.zeros((words.shape[0], cols), dtype=np.int64)
    for row, line in enumerate(words.view(torch.int32).numpy().view(np.uint8)):
        stream = [byte >> bit & 1 for byte in line.tolist() for bit in range(8)]
        for i in range(cols):
            found[row, i] = sum(bit << k for k, bit in enumerate(stream[i * bits : (i + 1) * bits]))
    return found


specs = st.one_of(
    st.builds(affine, st.sampled_from(BITS), st.sampled_from([32, 64, 128]), st.sampled_from([FP32, FP16, BF16])),
    st.builds(
        lambda bits, group, scale: int_weight(bits, group, scale=scale),
        *(st.sampled_from(BITS), st.sampled_from([32, 64, 128]), st.sampled_from([FP32, FP16, BF16])),
    ),
    st.sampled_from(list(MODES.values())),
)


@LAWS
@given(specs, st.integers(1, 9), st.sampled_from([128, 256, 384]), st.integers(0, 2**31))
def test_decode_undoes_encode_and_tensors_predicts_it(spec: QuantSpec, rows: int, cols: int, seed: int):
    layer = layer_of(spec, rows, cols)
    assert MLX.refusal(layer) is None
    q = part_of(layer, seed)
    stored = MLX.encode(layer, [q])
    found = {TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}
    assert found == set(MLX.tensors(layer))
    (back,) = MLX.decode(layer, stored.__getitem__)
    assert same(q, back)
    assert torch.equal(q.dequantize(), back.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_one_stream_of_bits(bits: int):
    layer = layer_of(affine(bits, 32, FP32), 3, 96)
    q = part_of(layer, 7)
    stored = MLX.encode(layer, [q])
    assert (slow(stored["a.b.weight"], bits, 96) == q.codes.numpy()).all()
    codes = torch.from_numpy(slow(stored["a.b.weight"], bits, 96)).float()
    scale, bias = (stored[f"a.b.{part}"].repeat_interleave(32, 1) for part in ("scales", "biases"))
    assert torch.equal(scale * codes + bias, q.dequantize())


def _settings(spec: QuantSpec) -> dict[str, Any]:
    config = MLX.config([layer_of(spec, 4, 128)], [])
    return {key: config[key] for key in ("group_size", "bits", "mode")}


def _to_mlx(mx: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.uint32:
        return mx.array(tensor.view(torch.int32).numpy().view(np.uint32))
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.float().numpy()).astype(mx.bfloat16)
    return mx.array(tensor.numpy())


@pytest.mark.parametrize("scale", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_the_same_numbers(bits: int, scale: Format):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'mlx[cpu]')")
    spec = affine(bits, 64, scale)
    layer = layer_of(spec, 8, 128)
    q = part_of(layer, bits)
    stored = MLX.encode(layer, [q])
    given = [_to_mlx(mx, stored[f"a.b.{part}"]).astype(kind) for part, kind in
             (("weight", mx.uint32), ("scales", mx.float32), ("biases", mx.float32))]  # fmt: skip
    theirs = torch.from_numpy(np.array(mx.dequantize(*given, **_settings(spec))))
    if scale == FP32:  # it may fuse product and sum
        assert torch.allclose(theirs, q.dequantize(), rtol=1e-6, atol=1e-6)
    else:  # products of 16-bit scales are exact
        assert torch.equal(theirs, q.dequantize())


@pytest.mark.parametrize("mode", MODES)
def test_mlx_dequantizes_floating_point_codes_to_the_same_numbers(mode: str):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'mlx[cpu]')")
    layer = layer_of(MODES[mode], 8, 128)
    q = part_of(layer, 3)
    stored = MLX.encode(layer, [q])
    words, scales = (_to_mlx(mx, stored[f"a.b.{part}"]) for part in ("weight", "scales"))
    dense = mx.dequantize(words, scales, dtype=mx.float32, **_settings(MODES[mode]))
    assert torch.equal(torch.from_numpy(np.array(dense)), q.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_a_file_of_mlx_is_read(bits: int, tmp_path: Path):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'mlx[cpu]')")
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(bits))
    words, scales, biases = mx.quantize(mx.array(weight.numpy()), group_size=32, bits=bits)
    mx.save_safetensors(str(tmp_path / "model.safetensors"),
                        {"a.b.weight": words, "a.b.scales": scales, "a.b.biases": biases})  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    (layer,) = MLX.read_layers({"quantization": {"group_size": 32, "bits": bits}}, checkpoint)
    (q,) = MLX.decode(layer, checkpoint.read)
    theirs = torch.from_numpy(np.array(mx.dequantize(words, scales, biases, group_size=32, bits=bits)))
    assert torch.allclose(q.dequantize(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_symmetric_integers_are_read_as_symmetric(bits: int, scale: Format, tmp_path: Path):
    spec = int_weight(bits, 64, scale=scale)
    layer = layer_of(spec, 4, 128)
    stored = MLX.encode(layer, [part_of(layer, 2)])
    (found,) = read(tmp_path, stored, bits=bits)
    assert found.scheme.weight == spec
    stored["a.b.biases"][-1, -1] += 1
    (found,) = read(tmp_path, stored, bits=bits)
    assert found.scheme.weight == affine(bits, 64, scale)


def test_integer_zero_points_are_spelled_as_biases_where_that_is_exact():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    half = quantize(weight, int_weight(4, 64, asymmetric=True, scale=FP16))
    spellings = list(MLX.spellings(layer_of(half.spec, 8, 128)))
    assert affine(4, 64, FP32) in spellings
    assert torch.equal(respell(half, affine(4, 64, FP32)).dequantize(), half.dequantize())
    symmetric = quantize(weight, int_weight(4, 64, scale=FP16))
    moved = respell(symmetric, affine(4, 64, FP16))
    assert same_bits(respell(moved, symmetric.spec).codes, symmetric.codes)
    with pytest.raises(SchemeError, match=r"rounds these numbers differently|minima"):
        respell(quantize(weight, int_weight(4, 64, asymmetric=True)), affine(4, 64, FP32))


def test_refusals():
    def refusal(spec: QuantSpec, **changes: object) -> str:
        return str(MLX.refusal(layer_of(spec, 4, 128, **changes)))

    assert "in groups of 32, 64, 128" in refusal(int_weight(4, 16))
    assert "integers of 2, 3, 4, 5, 6, 8 bits" in refusal(int_weight(7, 32))
    assert "groups that divide" in refusal(int_weight(4))
    assert "groups that divide" in refusal(QuantSpec(IntFormat(4), per_channel()))
    assert "biases like scales" in refusal(int_weight(4, 32, asymmetric=True))
    assert "biases like scales" in refusal(replace(affine(4, 32, FP32), minimum=FP16))
    assert "integers that are signed" in refusal(QuantSpec(IntFormat(4, False), per_group(32)))
    assert "integers of" in refusal(QuantSpec(get_format("nf4"), per_group(32)))
    assert "plainly" in refusal(replace(int_weight(4, 32), scale=QuantSpec(IntFormat(8), per_channel())))
    assert "stacks 2 experts" in refusal(int_weight(4, 32), experts=2)
    inputs = Scheme("test", int_weight(4, 32), PRESETS["W8A8"].input)
    assert "weight-only" in refusal(int_weight(4, 32), scheme=inputs)


def test_biases_that_overflow_are_refused():
    layer = layer_of(int_weight(4, 32, scale=FP16), 2, 32)
    q = part_of(layer, 1)
    assert isinstance(q.scale, Tensor)
    q.scale.fill_(60000.0)
    with pytest.raises(SchemeError, match="overflow"):
        MLX.encode(layer, [q])


def test_config_names_what_differs_and_what_is_kept():
    layers = [layer_of(int_weight(4, 64), 4, 128, module=name) for name in ("a", "b")]
    layers.append(layer_of(int_weight(8, 32), 4, 128, module="c"))
    config = MLX.config(layers, [("lm_head", "lm_head", "Linear")])
    common = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config == {**common, "c": {"group_size": 32, "bits": 8, "mode": "affine"}, "lm_head": False}
    assert MLX.recognises({"quantization": config})
    assert not MLX.recognises({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}})


def read(folder: Path, tensors: dict[str, Tensor], **settings: object) -> list[StoredLayer]:
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization": {"group_size": 64, "bits": 4, **settings}}
    return MLX.read_layers(config, open_checkpoint(folder))


def tensors_of(spec: QuantSpec, **changes: Tensor) -> dict[str, Tensor]:
    layer = layer_of(spec, 4, 128)
    return {**MLX.encode(layer, [part_of(layer, 2)]), **{f"a.b.{key}": value for key, value in changes.items()}}


def test_settings_of_a_layer_come_before_those_of_all(tmp_path: Path):
    (layer,) = read(tmp_path, tensors_of(affine(8, 32, FP16)), **{"a.b": {"group_size": 32, "bits": 8}})
    assert (layer.scheme.weight, layer.shape, layer.dtype) == (affine(8, 32, FP16), (4, 128), torch.float16)


@pytest.mark.parametrize(
    ("tensors", "settings", "told"),
    [
        (tensors_of(affine(4, 64, FP32)), {"bits": 7}, "quantization: bits"),
        (tensors_of(affine(4, 64, FP32)), {"group_size": "64"}, "quantization: group_size"),
        (tensors_of(affine(4, 64, FP32)), {"mode": "mxfp9"}, "quantization: mode"),
        (tensors_of(affine(4, 64, FP32)), {"bits": 8}, "not of 8 bits"),
        (tensors_of(affine(4, 64, FP32)), {"a.b": {"bits": 4}}, "a.b: group_size"),
        (tensors_of(affine(4, 64, FP32)), {"mode": "mxfp4"}, "mxfp4 has 4 bits in per_group"),
        (tensors_of(affine(4, 64, FP32), biases=torch.zeros(4, 1)), {}, "biases are needed"),
        (tensors_of(affine(4, 64, FP32), biases=torch.zeros(4, 2).half()), {}, "biases are needed"),
        (tensors_of(affine(4, 64, FP32), scales=torch.zeros(4, 3)), {}, "and scales"),
        (tensors_of(affine(4, 64, FP32), scales=torch.zeros(4)), {}, "a matrix of uint32"),
        (tensors_of(affine(4, 64, FP32), weight=torch.zeros(4, 16)), {}, "a matrix of uint32"),
        ({"a.weight": torch.zeros(2, 2)}, {}, "there are none"),
    ],
)
def test_damaged_files_are_refused(tensors: dict[str, Tensor], settings: dict[str, object], told: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=told):
        read(tmp_path, tensors, **settings)
