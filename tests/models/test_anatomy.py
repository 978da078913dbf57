"""Every tensor on disk has one place, and the right one."""

import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitgrain.errors import ModelError
from bitgrain.models.anatomy import Anatomy, read_anatomy


@dataclass
class Stored:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def stored(checkpoint) -> dict[str, Stored]:
    return {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in checkpoint.tensors.items()}


def roles(anatomy: Anatomy) -> dict[str, int]:
    return dict(Counter(weight.role for weight in anatomy.weights))


def groups(anatomy: Anatomy) -> dict[str, set[str]]:
    """Group id, numbers replaced by #, -> leaf names of its members."""
    found: dict[str, set[str]] = {}
    for weight in anatomy.weights:
        if weight.fused is not None:
            found.setdefault(re.sub(r"\d+", "#", weight.fused), set()).add(weight.module.rpartition(".")[2])
    return found


def test_every_tensor_is_in_one_place(any_tiny):
    anatomy = any_tiny.anatomy
    names = [*(weight.tensor for weight in anatomy.weights), *anatomy.others, *anatomy.unexpected]
    assert sorted(names) == sorted(any_tiny.tensors)
    assert anatomy.missing == ()
    assert anatomy.unexpected == ()
    assert anatomy.block_of.keys() == any_tiny.tensors.keys()
    assert anatomy.architecture == type(any_tiny.model).__name__


def test_no_matrix_is_left_over(any_tiny):
    for name in any_tiny.anatomy.others:
        assert any_tiny.tensors[name].ndim == 1 or name.endswith("bias")


def test_sizes_add_up(any_tiny):
    anatomy = any_tiny.anatomy
    count = anatomy.parameters
    assert count.total == sum(tensor.numel() for tensor in any_tiny.tensors.values())
    assert count.total == sum(
        (count.linear, count.expert, count.router, count.embedding, count.lm_head, count.conv, count.other)
    )
    for weight in anatomy.weights:
        assert weight.elements == any_tiny.tensors[weight.tensor].numel()


def test_inputs_and_outputs_are_those_of_the_module(any_tiny):
    for weight in any_tiny.anatomy.weights:
        module = any_tiny.model.get_submodule(weight.memory_module)
        assert type(module).__name__ == weight.class_name
        if isinstance(module, nn.Linear):
            assert (weight.out_features, weight.in_features) == (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            assert (weight.in_features, weight.out_features) == (module.nx, module.nf)
            assert weight.transposed
        elif isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            assert (weight.out_features, weight.in_features) == shape


def test_blocks(any_tiny):
    anatomy = any_tiny.anatomy
    assert len(anatomy.block_names) == 2
    for weight in anatomy.weights:
        outside = weight.role in ("embedding", "lm_head") or weight.tensor.startswith(("pooler", "cls"))
        assert (weight.block is None) == outside
        if weight.block is not None:
            assert weight.memory.startswith(anatomy.block_names[weight.block] + ".")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"linear": 14, "embedding": 1, "lm_head": 1}),
        ("llama-tied", {"linear": 14, "embedding": 1}),
        ("qwen3", {"linear": 14, "embedding": 1, "lm_head": 1}),
        ("gemma2", {"linear": 14, "embedding": 1}),
        ("gemma3", {"linear": 14, "embedding": 1}),
        ("phi", {"linear": 12, "embedding": 1, "lm_head": 1}),
        ("phi3", {"linear": 8, "embedding": 1, "lm_head": 1}),
        ("gpt2", {"linear": 8, "embedding": 2}),
        ("opt", {"linear": 12, "embedding": 2}),
        ("bert", {"linear": 13, "embedding": 3}),
        ("bert-mlm", {"linear": 13, "embedding": 3}),
        ("mixtral", {"linear": 8, "expert": 24, "router": 2, "embedding": 1, "lm_head": 1}),
        ("qwen3-moe", {"linear": 8, "expert": 24, "router": 2, "embedding": 1, "lm_head": 1}),
        # shared experts are ordinary linears; their gate is a router
        ("qwen2-moe", {"linear": 14, "expert": 24, "router": 4, "embedding": 1, "lm_head": 1}),
        ("deepseek-v3", {"linear": 16, "expert": 12, "router": 1, "embedding": 1, "lm_head": 1}),
        ("gpt-oss", {"linear": 8, "expert": 4, "router": 2, "embedding": 1, "lm_head": 1}),
        ("llama4", {"linear": 14, "expert": 4, "router": 2, "embedding": 1, "lm_head": 1}),
        ("granite-moe", {"linear": 8, "expert": 4, "router": 2, "embedding": 1, "lm_head": 1}),
    ],
)
def test_roles(tiny, name, expected):
    found = roles(tiny(name).anatomy)
    if "lm_head" not in expected:
        found.pop("lm_head", None)
    assert found == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_with_tensors_of_their_own(tiny, name):
    anatomy = tiny(name).anatomy
    experts = [weight for weight in anatomy.weights if weight.role == "expert"]
    assert {weight.experts for weight in experts} == {1}
    assert not any(weight.transposed for weight in experts)
    for weight in experts:
        assert f"experts.{weight.expert}." in weight.tensor
        down = weight.memory.endswith("down_proj")
        assert (weight.out_features, weight.in_features) == ((64, 192) if down else (192, 64))
    assert anatomy.parameters.expert >= 0.9 * anatomy.parameters.in_blocks


@pytest.mark.parametrize(
    ("name", "transposed"), [("gpt-oss", True), ("llama4", True), ("granite-moe", False), ("mixtral", False)]
)
def test_orientation_of_stacked_experts(tiny, name, transposed):
    checkpoint = tiny(name)
    experts = [weight for weight in checkpoint.anatomy.weights if weight.role == "expert"]
    for weight in experts:
        assert weight.transposed == transposed
        assert weight.experts == (1 if name == "mixtral" else 4)
        stored_shape = checkpoint.tensors[weight.tensor].shape[-2:]
        matrix = (weight.out_features, weight.in_features)
        assert tuple(stored_shape) == (matrix[::-1] if weight.transposed else matrix)
        reads_hidden = "down" not in weight.memory and "output" not in weight.memory
        assert (weight.in_features == 64) == reads_hidden


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"attn.qkv": {"q_proj", "k_proj", "v_proj"}, "mlp.gate_up": {"gate_proj", "up_proj"}}),
        ("opt", {"attn.qkv": {"q_proj", "k_proj", "v_proj"}}),
        ("bert", {"self.qkv": {"query", "key", "value"}}),
        ("phi3", {}),
        ("gpt2", {}),
        ("mixtral", {"attn.qkv": {"q_proj", "k_proj", "v_proj"}, "experts.#.gate_up": {"w1", "w3"}}),
        (
            "qwen3-moe",
            {"attn.qkv": {"q_proj", "k_proj", "v_proj"}, "experts.#.gate_up": {"gate_proj", "up_proj"}},
        ),
        (
            "deepseek-v3",
            {
                "attn.qkv_a": {"q_a_proj", "kv_a_proj_with_mqa"},
                "mlp.gate_up": {"gate_proj", "up_proj"},
                "experts.gate_up": {"gate_proj", "up_proj"},
                "experts.#.gate_up": {"gate_proj", "up_proj"},
            },
        ),
    ],
)
def test_fused_groups(tiny, name, expected):
    found = groups(tiny(name).anatomy)
    assert len(found) == len(expected)
    for ending, members in expected.items():
        assert [leaves for group, leaves in found.items() if group.endswith(ending)] == [members]


def test_the_id_of_a_group_names_its_place(tiny):
    fused = {weight.tensor: weight.fused for weight in tiny("mixtral").anatomy.weights}
    assert fused["model.layers.0.self_attn.k_proj.weight"] == "model.layers.0.self_attn.qkv"
    moe = "model.layers.1.block_sparse_moe.experts.3"
    assert fused[f"{moe}.w1.weight"] == fused[f"{moe}.w3.weight"] == f"{moe}.gate_up"
    assert fused[f"{moe}.w2.weight"] is None


def test_tied_names(tiny):
    assert tiny("llama-tied").anatomy.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert tiny("llama").anatomy.tied == ()
    assert ("lm_head.weight", "transformer.wte.weight") in tiny("gpt2").anatomy.tied


def test_both_tied_tensors_on_disk_are_not_one(tiny):
    checkpoint = tiny("llama-tied")
    both = {**stored(checkpoint), "lm_head.weight": Stored((128, 64))}
    anatomy = read_anatomy(checkpoint.skeleton, both)
    assert anatomy.tied == ()
    assert roles(anatomy)["lm_head"] == 1


def test_only_the_head_of_a_tied_pair_on_disk(tiny):
    checkpoint = tiny("llama-tied")
    headed = stored(checkpoint)
    headed["lm_head.weight"] = headed.pop("model.embed_tokens.weight")
    anatomy = read_anatomy(checkpoint.skeleton, headed)
    assert anatomy.missing == ()
    assert roles(anatomy) == {"linear": 14, "lm_head": 1}


def test_names_in_memory_differ_from_those_on_disk(tiny):
    weights = {weight.tensor: weight for weight in tiny("mixtral").anatomy.weights}
    weight = weights["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert weight.module == "model.layers.0.block_sparse_moe.experts.2.w3"
    assert weight.memory == "model.layers.0.mlp.experts.gate_up_proj"
    assert weight.memory_module == "model.layers.0.mlp.experts"
    assert weight.class_name == "MixtralExperts"
    assert weight.targets == (weight.memory,)


def test_a_base_model_is_read_into_a_model_with_a_head(tiny):
    """Checkpoints of BertModel have no "bert." before their names; transformers adds it."""
    base, headed = tiny("bert"), tiny("bert-mlm")
    anatomy = read_anatomy(headed.skeleton, stored(base))
    assert "encoder.layer.0.attention.self.query" in {weight.module for weight in anatomy.weights}
    assert all(name.startswith("cls.") for name in anatomy.missing)
    assert {name.partition(".")[0] for name in anatomy.unexpected} == {"pooler"}


def test_legacy_names(tiny):
    checkpoint = tiny("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in stored(checkpoint).items()
    }
    anatomy = read_anatomy(checkpoint.skeleton, old)
    assert anatomy.missing == anatomy.unexpected == ()
    assert "embeddings.LayerNorm.gamma" in anatomy.others


def test_what_is_missing_or_unknown_is_listed(tiny):
    checkpoint = tiny("llama")
    changed = stored(checkpoint)
    del changed["model.layers.1.self_attn.k_proj.weight"]
    changed["model.layers.2.extra.weight"] = Stored((3, 4))
    anatomy = read_anatomy(checkpoint.skeleton, changed)
    assert anatomy.missing == ("model.layers.1.self_attn.k_proj.weight",)
    assert anatomy.unexpected == ("model.layers.2.extra.weight",)
    assert anatomy.parameters.unexpected == 12


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", r"up_proj\.weight gives shape \[3, 64\] .* \[96, 64\]"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w1.weight", "cannot be turned into"),
    ],
)
def test_a_shape_that_does_not_fit(tiny, name, tensor, message):
    checkpoint = tiny(name)
    with pytest.raises(ModelError, match=message):
        read_anatomy(checkpoint.skeleton, {**stored(checkpoint), tensor: Stored((3, 64))})


def test_a_checkpoint_that_lacks_an_expert(tiny):
    checkpoint = tiny("mixtral")
    short = stored(checkpoint)
    del short["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    with pytest.raises(ModelError, match="down_proj"):
        read_anatomy(checkpoint.skeleton, short)


def test_the_order_is_natural(tiny):
    checkpoint = tiny("llama")
    layers = {f"model.layers.{index}.strange": Stored((1,)) for index in (10, 9, 2)}
    anatomy = read_anatomy(checkpoint.skeleton, {**stored(checkpoint), **layers})
    assert anatomy.unexpected == tuple(f"model.layers.{index}.strange" for index in (2, 9, 10))
    tensors = [weight.tensor for weight in anatomy.weights]
    assert tensors.index("model.layers.0.mlp.up_proj.weight") < tensors.index("model.layers.1.mlp.up_proj.weight")
