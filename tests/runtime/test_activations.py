"""Activations quantized at run time: the arithmetic of vLLM by hand, of transformers by compressed-tensors itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from bitgrain.checkpoints.compressed_tensors import _activation
from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_tensor
from bitgrain.numerics.observers import StaticInput
from bitgrain.pipeline.load import experts_run_one_by_one, input_quantizer_for
from bitgrain.recipes import PRESETS
from bitgrain.runtime.activations import InputQuantizer, quantize_expert_inputs, quantize_inputs
from random_specs import ASYMMETRIC_INPUT, LAWS

INPUTS = {name: scheme.input for name, scheme in PRESETS.items() if scheme.input and scheme.input.dynamic}
LIBRARY = [name for name in INPUTS if name not in ("W4A4", "W8A16INT16", "LLM_INT8")]


@st.composite
def activations(draw) -> torch.Tensor:
    """float32 [tokens, 256] with outliers, ties and a token of zeros."""
    x = torch.randn(draw(st.integers(1, 5)), 256, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    x *= draw(st.sampled_from([0.01, 1.0, 30.0]))
    match draw(st.sampled_from(["plain", "outlier", "ties", "zeros"])):
        case "outlier":
            x[:, 3] *= 60
        case "ties":  # absmax 127: steps of exactly 1, and many halves
            x = (x / x.abs().amax(-1, keepdim=True) * 254).round() / 2
        case "zeros":
            x[-1] = 0
        case _:
            pass
    return x


@LAWS
@given(activations())
def test_int8_per_token_is_vllms_formula(x: torch.Tensor):
    """scale = absmax / 127; q = clamp(rint(x / scale), -128, 127), ties to even (scaled_quant.cu)."""
    found = input_quantizer_for(INPUTS["W8A8"])(x)
    for row, expected in zip(found, x, strict=True):
        scale = expected.abs().max() / 127
        codes = [round(float(v)) for v in expected / scale] if scale > 0 else [0] * len(expected)
        assert max(map(abs, codes)) <= 127
        assert torch.equal(row, torch.tensor(codes, dtype=torch.float32) * scale)


@LAWS
@given(activations())
def test_fp8_per_token_is_absmax_over_448(x: torch.Tensor):
    found = input_quantizer_for(INPUTS["FP8_DYNAMIC"])(x)
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found, codes.float() * scale)


def test_ties_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    assert input_quantizer_for(INPUTS["W8A8"])(x).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LIBRARY)
@LAWS
@given(x=activations(), shape=st.sampled_from([(1, -1, 256), (-1, 256), (-1, 1, 256), (-1, 2, 1, 128)]))
def test_transformers_rounding_is_the_librarys(name: str, dtype: torch.dtype, x: torch.Tensor, shape: tuple[int, ...]):
    """compute_dynamic_scales_and_zp and fake_quantize of compressed-tensors, bit for bit, in the dtype of the model."""
    spec = INPUTS[name]
    arguments = QuantizationArgs.model_validate(_activation(spec))
    quantizer = input_quantizer_for(spec, "transformers")
    shared = None if quantizer.outer_scale is None else torch.tensor([1 / quantizer.outer_scale])
    batch = x.to(dtype).reshape(shape)
    scale, zero = compute_dynamic_scales_and_zp(batch, arguments, nn.Linear(1, 1), global_scale=shared)
    theirs = library_fake_quantize(batch, scale, zero, arguments, global_scale=shared)
    assert torch.equal(quantizer(batch), theirs)


def test_compressed_tensors_knows_tokens_only_in_batches():
    """A matrix of inputs gets one scale there; vLLM's kernels, and we, see tokens in it."""
    x = torch.tensor([[127.0, 1.4], [1.27, 0.6]])
    spec = INPUTS["W8A8"]
    assert torch.allclose(input_quantizer_for(spec)(x), torch.tensor([[127.0, 1.0], [1.27, 0.6]]))
    assert input_quantizer_for(spec, "transformers")(x)[1].tolist() == pytest.approx([0.996, 0.996], abs=0.001)


def test_the_two_roundings_differ_only_for_symmetric_integers():
    x = torch.randn(1, 3, 256, generator=torch.Generator().manual_seed(0))
    different = {
        name
        for name, spec in INPUTS.items()
        if not torch.equal(input_quantizer_for(spec)(x), input_quantizer_for(spec, "transformers")(x))
    }
    assert different == {name for name, spec in INPUTS.items() if spec.restricted}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shape_and_dtype_stay_and_tokens_are_independent(name: str, dtype: torch.dtype):
    quantizer = input_quantizer_for(INPUTS[name])
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = quantizer(x)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert not list(quantizer.parameters())
    assert not quantizer.state_dict()
    for i in range(2):
        for j in range(3):
            assert torch.equal(quantizer(x[i, j]), found[i, j])
    empty = torch.empty(0, 128, dtype=dtype)
    assert quantizer(empty) is empty


def test_outer_scale_reaches_nvfp4():
    spec = INPUTS["NVFP4"]
    x = torch.full((1, 16), 1000.0)  # beyond 6 * 448 / 4
    assert float(input_quantizer_for(spec)(x).max()) == 6 * 448 * 0.25
    assert float(InputQuantizer(spec, 1.0)(x).max()) > 900


def test_static_specs_need_a_scale():
    with pytest.raises(SchemeError, match="inputs fp8_e4m3 per_tensor, scale float32 have a static scale"):
        InputQuantizer(QuantSpec(get_format("fp8_e4m3"), per_tensor()))


@LAWS
@given(activations(), st.floats(0.01, 3.0))
def test_static_int8_is_vllms_formula(x: torch.Tensor, scale: float):
    """q = clamp(rint(x / scale), -128, 127), also where the scale was chosen for -127 .. 127 (scaled_quant.cu)."""
    static = StaticInput(torch.tensor([[scale]]))
    found = InputQuantizer(PRESETS["W8A8_STATIC"].input, static=static)(x)
    codes = [[min(127, max(-128, round(float(v)))) for v in row] for row in x / static.scale]
    assert torch.equal(found, torch.tensor(codes, dtype=torch.float32) * static.scale)


@LAWS
@given(activations(), st.floats(0.01, 1.0))
def test_static_fp8_saturates_at_448(x: torch.Tensor, scale: float):
    static = StaticInput(torch.tensor([[scale]], dtype=torch.bfloat16))
    step = static.scale.float()
    found = InputQuantizer(PRESETS["FP8"].input, static=static)(x)
    assert torch.equal(found, (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [PRESETS["W8A8_STATIC"].input, PRESETS["FP8"].input, ASYMMETRIC_INPUT], ids=str)
@settings(LAWS, max_examples=15)
@given(x=activations(), scale=st.floats(0.01, 1.0), zero=st.integers(-128, 127))
def test_static_rounding_of_transformers_is_the_librarys(spec: QuantSpec, dtype: torch.dtype, x, scale, zero):
    """fake_quantize of compressed-tensors with scales in the dtype of the model, bit for bit."""
    point = None if spec.symmetric else torch.tensor([[zero]], dtype=torch.int8)
    static = StaticInput(torch.tensor([[scale]], dtype=dtype), point)
    arguments = QuantizationArgs.model_validate(_activation(spec))
    x = x.to(dtype)
    theirs = library_fake_quantize(x, static.scale.view(1), None if point is None else point.view(1), arguments)
    assert torch.equal(InputQuantizer(spec, rounding="transformers", static=static)(x), theirs)


def test_static_scales_keep_dtype_and_shape_and_leave_no_trace_in_the_state():
    quantizer = InputQuantizer(ASYMMETRIC_INPUT, static=StaticInput(torch.tensor([[0.1]]), torch.tensor([[3]])))
    x = torch.randn(2, 3, 8).to(torch.bfloat16)
    assert quantizer(x).dtype == torch.bfloat16
    assert quantizer(x).shape == x.shape
    assert not quantizer.state_dict()
    assert "int8 per_tensor asymmetric" in repr(quantizer)


def test_a_linear_sees_quantized_inputs_however_it_is_called():
    torch.manual_seed(0)
    linear = nn.Linear(64, 8)
    plain = nn.Linear(64, 8)
    plain.load_state_dict(linear.state_dict())
    quantizer = input_quantizer_for(INPUTS["W8A8"])
    quantize_inputs(linear, quantizer)
    x = torch.randn(4, 64)
    assert torch.equal(linear(x), plain(quantizer(x)))
    assert not torch.equal(linear(x), plain(x))
    assert "int8 per_channel dynamic" in repr(linear)
    assert linear.state_dict().keys() == plain.state_dict().keys()


def moe(name: str) -> tuple[Any, Any]:
    """A mixture of experts in memory that runs its experts one by one, and its first MLP."""
    model = zoo.build(name)
    experts_run_one_by_one(model.config)
    return model, model.model.layers[0].mlp


def test_inputs_of_experts_are_quantized():
    """Mixtral's experts against a loop written by hand: both products of each expert get quantized inputs."""
    _, mlp = moe("mixtral")
    experts = mlp.experts
    quantizer = input_quantizer_for(INPUTS["W8A8"])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 128, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    shares = torch.rand(7, 2, generator=generator)
    with torch.inference_mode():
        before = experts(x, chosen, shares)
        quantize_expert_inputs(experts, {"gate_up_proj": quantizer, "down_proj": quantizer})
        found = experts(x, chosen, shares)
        expected = torch.zeros_like(x)
        for token in range(7):
            for place in range(2):
                expert = int(chosen[token, place])
                gate, up = F.linear(quantizer(x[token : token + 1]), experts.gate_up_proj[expert]).chunk(2, -1)
                hidden = quantizer(F.silu(gate) * up)
                expected[token] += (F.linear(hidden, experts.down_proj[expert]) * shares[token, place])[0]
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 1e-4  # it does something


def test_only_the_named_expert_weights_are_watched():
    _, mlp = moe("mixtral")
    x, chosen, shares = torch.randn(3, 128), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    calls: list[torch.Size] = []

    class Recorder(InputQuantizer):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            calls.append(given.shape)
            return given

    quantize_expert_inputs(mlp.experts, {"down_proj": Recorder(INPUTS["W8A8"])})
    with torch.inference_mode():
        mlp.experts(x, chosen, shares)
    assert calls == [torch.Size([3, 256])]


def test_transposed_experts_are_watched_too():
    """gpt-oss stores [in, out] and multiplies with bmm or @."""
    model, mlp = moe("gpt-oss")
    x = torch.randn(1, 5, 128)
    with torch.inference_mode():
        before = mlp(x)[0]
        exact = replace(INPUTS["W8A16INT16"])
        quantize_expert_inputs(mlp.experts, dict.fromkeys(("gate_up_proj", "down_proj"), input_quantizer_for(exact)))
        close = mlp(x)[0]
    assert float((close - before).abs().max()) > 0  # seen
    assert torch.allclose(close, before, atol=1e-3)
    with torch.inference_mode():
        assert torch.isfinite(zoo.outputs(model, zoo.ids_for(model))).all()
