"""transformers' conversion rules, followed on shapes."""

from dataclasses import dataclass

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter, WeightRenaming

from bitgrain.errors import ModelError
from bitgrain.models import naming
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.naming import convert_tensors, natural_order, revert_tensors, trace_routes


@dataclass
class Stored:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@pytest.fixture
def phi(tiny, monkeypatch):
    """A Phi (4 heads each for q, k and v) whose checkpoint follows the given rules instead of transformers'."""
    checkpoint = tiny("phi")
    stored = {name: Stored(tuple(tensor.shape)) for name, tensor in checkpoint.tensors.items()}

    def follow(*rules):
        monkeypatch.setattr(naming, "get_model_conversion_mapping", lambda model: list(rules))
        return checkpoint.skeleton, dict(stored)

    return follow


def test_a_transpose_flips(phi):
    skeleton, stored = phi(WeightConverter("mlp.fc1.weight", "mlp.fc1.weight", [Transpose(0, 1)]))
    for name in stored:
        if name.endswith("fc1.weight"):
            stored[name] = Stored((64, 96))
    weights = {weight.module: weight for weight in read_anatomy(skeleton, stored).weights}
    weight = weights["model.layers.0.mlp.fc1"]
    assert (weight.transposed, weight.out_features, weight.in_features) == (True, 96, 64)
    assert not weights["model.layers.0.mlp.fc2"].transposed


def test_two_transposes_do_not(phi):
    rule = WeightConverter("mlp.fc1.weight", "mlp.fc1.weight", [Transpose(0, 1), Transpose(1, 0)])
    assert not any(route.flipped for route in trace_routes(*phi(rule)).values())


def test_a_transpose_only_where_shapes_ask_for_it(phi):
    rule = WeightConverter("mlp.fc1.weight", "mlp.fc1.weight", [Transpose(0, 1, check_dims=True)])
    skeleton, stored = phi(rule)
    name = "model.layers.1.mlp.fc1.weight"
    stored[name] = Stored((64, 96))
    assert {name for name, route in trace_routes(skeleton, stored).items() if route.flipped} == {name}


def test_one_tensor_that_is_split(phi):
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    skeleton, stored = phi(WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)]))
    for index in range(2):
        for part in parts:
            del stored[f"model.layers.{index}.{part}"]
        stored[f"model.layers.{index}.self_attn.qkv.weight"] = Stored((192, 64))
    anatomy = read_anatomy(skeleton, stored)
    assert anatomy.missing == anatomy.unexpected == ()
    weight = next(weight for weight in anatomy.weights if weight.module == "model.layers.1.self_attn.qkv")
    assert weight.targets == tuple(f"model.layers.1.{part}" for part in parts)
    assert weight.memory == weight.targets[0]
    assert (weight.out_features, weight.in_features, weight.fused) == (192, 64, None)
    assert (weight.role, weight.class_name) == ("linear", "Linear")


def test_tensors_that_are_joined_share_a_group(phi):
    halves = ["mlp.left.weight", "mlp.right.weight"]
    skeleton, stored = phi(WeightConverter(halves, "mlp.fc1.weight", [Concatenate(dim=0)]))
    for index in range(2):
        del stored[f"model.layers.{index}.mlp.fc1.weight"]
        stored |= {f"model.layers.{index}.{half}": Stored((48, 64)) for half in halves}
    anatomy = read_anatomy(skeleton, stored)
    assert anatomy.missing == anatomy.unexpected == ()
    joined = [weight for weight in anatomy.weights if weight.memory == "model.layers.0.mlp.fc1.weight"]
    assert [(weight.out_features, weight.fused) for weight in joined] == [(48, "model.layers.0.mlp.fused")] * 2


def test_renamed_tensors_keep_their_names_on_disk(phi):
    skeleton, stored = phi(WeightRenaming("feed_forward", "mlp"))
    renamed = {name.replace("mlp", "feed_forward"): value for name, value in stored.items()}
    routes = trace_routes(skeleton, renamed)
    name = "model.layers.0.feed_forward.fc1.weight"
    assert routes[name].targets == ("model.layers.0.mlp.fc1.weight",)
    assert routes.keys() == renamed.keys()


def test_a_rule_that_fails_names_the_tensors(phi):
    halves = ["mlp.left.weight", "mlp.right.weight"]
    skeleton, stored = phi(WeightConverter(halves, "mlp.fc1.weight", [Concatenate(dim=0)]))
    stored |= {f"model.layers.0.{half}": Stored(shape) for half, shape in zip(halves, [(48, 64), (48, 63)])}
    with pytest.raises(ModelError, match=r"mlp\.left\.weight and 1 more cannot be turned into .*Concatenate"):
        trace_routes(skeleton, stored)


def test_natural_order():
    assert natural_order(["h.10.w", "h.9.w", "h.a.w", "h.w2", "h.w11"]) == ["h.9.w", "h.10.w", "h.a.w", "h.w2", "h.w11"]


def test_convert_gives_what_transformers_loads(tiny, zoo_name):
    checkpoint = tiny(zoo_name)
    expected = checkpoint.model.state_dict()
    found = convert_tensors(checkpoint.skeleton, checkpoint.tensors)
    tied = {name for group in checkpoint.anatomy.tied for name in group}
    assert expected.keys() - found.keys() <= tied
    assert found.keys() <= expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_revert_is_the_inverse_of_convert(tiny, zoo_name):
    checkpoint = tiny(zoo_name)
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    converted = convert_tensors(checkpoint.skeleton, checkpoint.tensors)
    found = revert_tensors(checkpoint.skeleton, converted, checkpoint.tensors)
    assert found.keys() == checkpoint.tensors.keys()
    for name, tensor in found.items():
        assert tensor.shape == checkpoint.tensors[name].shape
        assert torch.equal(tensor, checkpoint.tensors[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.tensors.items())


def test_a_block_alone_is_converted_and_reverted(tiny, zoo_name):
    """What a streamed model does: the tensors of one block only."""
    checkpoint = tiny(zoo_name)
    block = {name: tensor for name, tensor in checkpoint.tensors.items() if checkpoint.anatomy.block_of[name] == 1}
    found = convert_tensors(checkpoint.skeleton, block)
    prefix = checkpoint.anatomy.block_names[1] + "."
    assert found
    assert all(name.startswith(prefix) for name in found)
    reverted = revert_tensors(checkpoint.skeleton, found, block)
    assert reverted.keys() == block.keys()
    assert all(torch.equal(tensor, block[name]) for name, tensor in reverted.items())


def test_convert_leaves_unknown_names_out_and_revert_leaves_the_model_as_it_was(tiny):
    checkpoint = tiny("llama")
    stray = {"model.layers.0.mlp.bonus.weight": torch.zeros(2, 2)}
    assert convert_tensors(checkpoint.skeleton, stray) == {}
    marks = getattr(checkpoint.skeleton, "_weight_conversions", None)
    revert_tensors(checkpoint.skeleton, {"lm_head.weight": torch.zeros(1)}, [])
    assert getattr(checkpoint.skeleton, "_weight_conversions", None) is marks


def test_convert_joins_in_the_natural_order_of_experts(phi):
    """Ten experts and more: 10 comes after 9, whatever order the names are given in."""
    rule = WeightConverter(["experts.*.left", "experts.*.right"], "mlp.fc1.weight", [Concatenate(dim=0)])
    skeleton, _ = phi(rule)
    parts = {f"model.layers.0.experts.{i}.left": torch.full((4, 64), float(i)) for i in reversed(range(12))}
    parts |= {f"model.layers.0.experts.{i}.right": torch.full((4, 64), 100.0 + i) for i in range(12)}
    (found,) = convert_tensors(skeleton, parts).values()
    assert found[::4, 0].tolist() == [*range(12), *range(100, 112)]


@pytest.mark.parametrize("names", ["legacy", "base"])
def test_names_of_older_checkpoints_come_back(tiny, names):
    """Layer norms with gamma and beta; names without the base model's prefix, as the hub's gpt2 has them."""
    checkpoint = tiny("bert" if names == "legacy" else "gpt2")

    def older(name):
        legacy = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return legacy if names == "legacy" else name.removeprefix("transformer.")

    old = {older(name): tensor for name, tensor in checkpoint.tensors.items()}
    assert old.keys() != checkpoint.tensors.keys()
    converted = convert_tensors(checkpoint.skeleton, old)
    assert converted.keys() == convert_tensors(checkpoint.skeleton, checkpoint.tensors).keys()
    reverted = revert_tensors(checkpoint.skeleton, converted, old)
    assert reverted.keys() == old.keys()
    assert all(torch.equal(tensor, old[name]) for name, tensor in reverted.items())
