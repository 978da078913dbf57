"""Engines' rules: which layers each engine's kernels run, and the one line that says why not."""

from dataclasses import replace

import pytest
import torch

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.numerics import IntFormat, QuantSpec, get_format, mxfp4, per_channel, per_group
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.spec import int_weight, nf4_double_quantized
from bitgrain.pipeline.engine_rules import RULES, TRANSFORMERS, VLLM
from bitgrain.pipeline.engines import Verdict, judge
from bitgrain.recipes import Scheme, get_scheme
from bitgrain.search.candidates import candidate_specs

_NESTED = QuantSpec(IntFormat(6, is_signed=False), per_group(8), scale=FP16)
_SUPER = QuantSpec(IntFormat(8), per_group(16), scale=FP16)
Q4_0 = int_weight(4, 32, scale=FP16)
Q4_K = QuantSpec(*(IntFormat(4, is_signed=False), per_group(32)), zero_point="minimum", scale=_NESTED, minimum=_NESTED)
Q6_K = QuantSpec(IntFormat(6), per_group(16), scale=_SUPER)
TQ2_0 = QuantSpec(get_format("ternary"), per_group(256), scale=FP16)


def layer(
    scheme: Scheme | QuantSpec, shape: tuple[int, int] = (512, 512), role: str = "linear", name: str = "x"
) -> StoredLayer:
    return StoredLayer(
        tensor=f"{name}.weight",
        module=name,
        memory_module=name,
        class_name="Linear",
        role=role,
        out_features=shape[0],
        in_features=shape[1],
        experts=1,
        transposed=False,
        dtype=torch.bfloat16,
        scheme=scheme if isinstance(scheme, Scheme) else Scheme("test", scheme),
    )


def verdicts(layout: str, *layers: StoredLayer) -> dict[str, Verdict]:
    return {verdict.engine: verdict for verdict in judge(layers, [], layout)}


def loading(layout: str, *layers: StoredLayer) -> list[str]:
    return [engine for engine, verdict in verdicts(layout, *layers).items() if verdict.loads]


def why(layout: str, engine: str, *layers: StoredLayer) -> str:
    found = verdicts(layout, *layers)[engine]
    assert not found.loads
    (reason,) = found.reasons
    return reason


@pytest.mark.parametrize(
    ("layout", "engines"),
    [
        ("compressed-tensors", ["vLLM", "SGLang", "transformers", "bitgrain"]),
        ("bitgrain", ["vLLM", "SGLang", "transformers", "bitgrain"]),
        ("gptq", ["vLLM", "SGLang", "transformers", "GPTQModel", "bitgrain"]),
        ("gguf:q4_k", ["vLLM", "SGLang", "transformers", "llama.cpp", "bitgrain"]),
        ("onnx-qdq", ["onnxruntime", "bitgrain"]),
        ("bnb-nf4", ["SGLang", "transformers", "bitgrain"]),
        ("mlx", ["mlx-lm", "bitgrain"]),
    ],
)
def test_only_engines_that_know_the_layout_are_told(layout: str, engines: list[str]):
    assert list(verdicts(layout, layer(Q4_0))) == engines


def test_every_rule_names_a_version_and_says_something():
    assert all(rules.engine.version for rules in RULES)
    assert all(bool(rules.kernels) != bool(rules.why) for rules in RULES)
    pairs = [(rules.engine, name) for rules in RULES for name in rules.layouts]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    ("layout", "spec", "engines"),
    [
        ("gptq", int_weight(4, 128), ["vLLM", "SGLang", "transformers", "GPTQModel", "bitgrain"]),
        ("gptq", int_weight(3, 128), ["transformers", "GPTQModel", "bitgrain"]),
        ("gptq-v2", int_weight(4, 128, asymmetric=True), ["transformers", "GPTQModel", "bitgrain"]),
        ("gptq", replace(int_weight(4, 128), ordered=True), ["SGLang", "transformers", "GPTQModel", "bitgrain"]),
        (
            "awq",
            int_weight(4, 128, asymmetric=True),
            ["vLLM", "SGLang", "transformers", "GPTQModel", "mlx-lm", "bitgrain"],
        ),
        ("awq", int_weight(4, 16, asymmetric=True), ["transformers", "GPTQModel", "bitgrain"]),
        ("gguf", Q4_0, ["vLLM", "SGLang", "transformers", "llama.cpp", "bitgrain"]),
        ("gguf", Q4_K, ["vLLM", "SGLang", "transformers", "llama.cpp", "bitgrain"]),
        ("gguf", Q6_K, ["vLLM", "SGLang", "transformers", "llama.cpp", "bitgrain"]),
        ("gguf", TQ2_0, ["llama.cpp", "bitgrain"]),
        ("gguf", mxfp4(), ["llama.cpp", "bitgrain"]),
        ("gguf", replace(Q4_0, format=IntFormat(7)), ["bitgrain"]),
        ("onnx-nbits", int_weight(4, 32), ["onnxruntime"]),
        ("onnx-nbits", int_weight(3, 32), []),
        ("onnx-qdq", int_weight(8), ["onnxruntime"]),
        ("bnb-nf4", nf4_double_quantized(), ["SGLang", "transformers", "bitgrain"]),
        ("mlx", int_weight(6, 64), ["mlx-lm", "bitgrain"]),
        ("mlx", int_weight(7, 64), ["bitgrain"]),
    ],
)
def test_formats_of_each_layout(layout: str, spec: QuantSpec, engines: list[str]):
    assert loading(layout, layer(spec)) == engines


@pytest.mark.parametrize(
    ("layout", "engine", "what", "reason"),
    [
        ("gptq", "vLLM", layer(int_weight(3, 128)), "no kernel for 3-bit weights, only 4 and 8"),
        (
            "gptq",
            "vLLM",
            layer(replace(int_weight(4, 64), ordered=True)),
            "no kernel for act-order, columns in an order of their own",
        ),
        ("gptq", "SGLang", layer(int_weight(4, 64, asymmetric=True)), "no kernel for asymmetric 4-bit weights"),
        (
            *("gptq", "GPTQModel", layer(int_weight(4, 64, asymmetric=True))),
            "it takes v1 with zero points from no other program: write gptq-v2",
        ),
        ("compressed-tensors", "vLLM", layer(int_weight(4, 16)), "no kernel for groups of 16, only 32, 64 and 128"),
        (
            "compressed-tensors",
            "SGLang",
            layer(int_weight(8, asymmetric=True)),
            "no kernel for asymmetric 8-bit weights",
        ),
        (
            *("compressed-tensors", "SGLang", layer(int_weight(4, 32), (96, 96), name="a.b")),
            "4-bit kernels need outputs % 64 = 0 and inputs % 128 = 0, a.b is (96, 96)",
        ),
        ("compressed-tensors", "vLLM", layer(get_scheme("W4A8"), role="expert"), "W4A8 experts run on Arm CPUs only"),
        (
            *("compressed-tensors", "SGLang", layer(get_scheme("W8A8"), role="expert")),
            "int8 experts with int8 activations run on Ascend NPUs only",
        ),
        ("compressed-tensors", "vLLM", layer(int_weight(4, 32), role="router"), "routers stay in full precision there"),
        (
            "compressed-tensors",
            "vLLM",
            layer(get_scheme("NVFP4A16"), role="lm_head"),
            "no kernel for FP4 weights of output layers",
        ),
        (
            "compressed-tensors",
            "vLLM",
            layer(get_scheme("W8A16_TENSOR")),
            "weight-only kernels need scales per channel or per group",
        ),
        ("awq", "transformers", layer(int_weight(4, 64), role="lm_head"), "output layers stay in full precision there"),
        ("gguf", "llama.cpp", layer(int_weight(4, 32)), "its scales are float16, not float32"),
        ("gguf", "llama.cpp", layer(Q4_K, (64, 384), name="y"), "4-bit kernels need inputs % 256 = 0, y is (64, 384)"),
        ("onnx-nbits", "onnxruntime", layer(int_weight(5, 32)), "no kernel for 5-bit weights, only 2, 4 and 8"),
        ("bnb-nf4", "transformers", layer(int_weight(4, 64)), "no kernel for 4-bit weights, only 8"),
    ],
)
def test_the_reason_names_the_rule(layout: str, engine: str, what: StoredLayer, reason: str):
    assert why(layout, engine, what) == reason


def test_what_is_done_differently_is_told():
    narrow = layer(get_scheme("W4AFP8"))
    assert verdicts("compressed-tensors", narrow)["vLLM"].reasons == (
        "int4 weights with FP8 activations run on Hopper GPUs only",
    )
    int8 = Scheme("int8", int_weight(8))
    assert verdicts("bnb-int8", layer(int8))["transformers"].reasons == (
        "needs bitsandbytes",
        "bitsandbytes rounds the inputs of int8 layers to int8 as well",
    )
    asymmetric = layer(int_weight(4, 64, asymmetric=True))
    assert "half precision" in verdicts("awq", asymmetric)["mlx-lm"].reasons[0]
    assert not verdicts("awq", layer(int_weight(4, 64)))["mlx-lm"].reasons


def test_zero_points_beside_another_scheme():
    first, second = layer(int_weight(4, 64, asymmetric=True)), layer(int_weight(8))
    assert "transformers" in loading("compressed-tensors", first)
    assert "beside another scheme" in why("compressed-tensors", "transformers", first, second)


def test_layers_of_one_kind_are_told_one_by_one_where_the_reason_names_them():
    layers = [layer(int_weight(4, 32), (96, 96), name=f"x.{i}") for i in range(3)]
    reasons = verdicts("compressed-tensors", *layers)["SGLang"].reasons
    assert [reason.split(", ")[1] for reason in reasons] == [f"x.{i} is (96" for i in range(3)]


def test_what_engines_join_shares_a_scheme_and_whole_blocks():
    q, k = layer(int_weight(4, 128), name="q"), layer(int_weight(8), name="k")
    found = {v.engine: v for v in judge([q, k], [("a.qkv", [q, k])], "compressed-tensors")}
    assert found["vLLM"].reasons == ("layers that it fuses have different schemes: a.qkv",)
    assert found["transformers"].loads
    blocks = get_scheme("FP8_BLOCK")
    q, k, v = (layer(blocks, (rows, 256), name=name) for name, rows in (("q", 256), ("k", 64), ("v", 64)))
    found = {one.engine: one for one in judge([q, k, v], [("a.qkv", [q, k, v])], "compressed-tensors")}
    assert found["vLLM"].reasons == ("layers that it fuses end inside a block of 128 outputs: a.qkv",)
    found = {one.engine: one for one in judge([q, v], [("a.qv", [q, v])], "compressed-tensors")}
    assert found["vLLM"].loads


@pytest.mark.parametrize(
    ("engine", "name", "layout"),
    [
        ("vllm", "vLLM", "compressed-tensors"),
        ("sglang", "SGLang", "compressed-tensors"),
        ("transformers", "transformers", "compressed-tensors"),
        ("llama.cpp", "llama.cpp", "gguf"),
    ],
)
def test_what_a_search_may_choose_is_what_the_engine_loads(engine: str, name: str, layout: str):
    for shape in ((64, 256), (128, 96), (48, 172), (512, 512), (64, 192)):
        for role in ("linear", "lm_head", "embedding"):
            for spec in candidate_specs(engine, shape, scale=FP16, role=role):
                found = verdicts(layout, layer(spec, shape, role))[name]
                assert found.loads, (spec.describe(), shape, role, found.reasons)


def test_versions_are_told():
    found = judge([layer(int_weight(4, 128))], [], "compressed-tensors")
    assert found[0].title == f"vLLM {VLLM.version}"
    assert found[2].title == f"transformers {TRANSFORMERS.version}"
    assert found[-1].title == "bitgrain"


def test_inputs_are_part_of_the_rule():
    token = QuantSpec(IntFormat(8), per_channel(), restricted=True, dynamic=True)
    static = replace(token, dynamic=False)
    scheme = Scheme("x", int_weight(8), token)
    assert "vLLM" in loading("compressed-tensors", layer(scheme))
    odd = why("compressed-tensors", "vLLM", layer(replace(scheme, input=static)))
    assert odd == "no kernel for 8-bit weights with static int8 activations"
