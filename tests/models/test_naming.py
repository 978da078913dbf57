"""transformers' conversion rules, followed on shapes."""

from dataclasses import dataclass

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter, WeightRenaming

from bitgrain.errors import ModelError
from bitgrain.models import naming
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.naming import natural_order, trace_routes


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
