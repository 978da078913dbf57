"""`quantize_` on any torch module, and `quantize_tensor`."""

from typing import Any

import pytest
import torch
from torch import nn

import bitgrain
import zoo
from bitgrain.errors import NumericsError, PlanError, RecipeError, SchemeError
from bitgrain.numerics import QTensor, QuantSpec, get_format, per_group, quantize
from bitgrain.recipes import PRESETS, make_recipe
from bitgrain.runtime.activations import InputQuantizer


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.LayerNorm(256), nn.Linear(256, 8, bias=False))


PLAIN = [name for name, one in PRESETS.items() if not one.needs_calibration and one.indivisible(256, 128) is None]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_module(name: str):
    module, original = sequential(), sequential()
    scheme = PRESETS[name]
    results = bitgrain.quantize_(module, name)
    assert list(results) == ["0.weight", "3.weight"]
    for key, parts in results.items():
        (q,) = parts
        assert isinstance(q, QTensor)
        expected = quantize(original.get_parameter(key), scheme.weight).dequantize()
        assert torch.equal(module.get_parameter(key), expected)
        assert torch.equal(q.dequantize(), expected)
        assert module.get_parameter(key).requires_grad
    assert torch.equal(module[0].bias, original[0].bias)
    assert torch.equal(module[2].weight, original[2].weight)
    assert [isinstance(getattr(one, "input_quantizer", None), InputQuantizer) for one in module] == (
        [True, False, False, True] if scheme.input else [False] * 4
    )
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    first = module[0].input_quantizer(x) if scheme.input else x
    hidden = module[2](torch.relu(nn.functional.linear(first, module[0].weight, module[0].bias)))
    second = module[3].input_quantizer(hidden) if scheme.input else hidden
    assert torch.equal(module(x), nn.functional.linear(second, module[3].weight))


def test_state_dict_and_optimizers_see_nothing_new():
    module = sequential()
    keys = list(module.state_dict())
    bitgrain.quantize_(module, "W8A8")
    assert list(module.state_dict()) == keys
    other = sequential()
    other.load_state_dict(module.state_dict())


def test_a_scheme_object_and_a_recipe_mean_the_same():
    by_name, by_scheme, by_recipe = sequential(), sequential(), sequential()
    bitgrain.quantize_(by_name, "w4a16")
    bitgrain.quantize_(by_scheme, PRESETS["W4A16"])
    bitgrain.quantize_(by_recipe, make_recipe(scheme="W4A16"))
    for key, expected in by_name.state_dict().items():
        assert torch.equal(by_scheme.state_dict()[key], expected)
        assert torch.equal(by_recipe.state_dict()[key], expected)


def test_rules_keep_and_change():
    module, original = sequential(), sequential()
    recipe = make_recipe(scheme="W4A16", rules=[{"match": "0", "keep": True}, {"match": "3", "scheme": "W8A16"}])
    results = bitgrain.quantize_(module, recipe)
    assert list(results) == ["3.weight"]
    assert results["3.weight"][0].spec == PRESETS["W8A16"].weight
    assert torch.equal(module[0].weight, original[0].weight)
    with pytest.raises(RecipeError, match="'head' matches no layer"):
        bitgrain.quantize_(sequential(), make_recipe(scheme="W4A16", rules=[{"match": "head", "keep": True}]))


@pytest.mark.parametrize(("way", "expected"), [("pad", "W4A16"), ("channel", "W8"), ("skip", None)])
def test_groups_that_do_not_divide(way: str, expected: str | None):
    def module() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(100, 16), nn.Linear(16, 128), nn.Linear(128, 4))

    with pytest.raises(PlanError, match=r"0\.weight: weight per_group\(128\) does not divide 100 input features"):
        bitgrain.quantize_(module(), "W4A16")
    results = bitgrain.quantize_(module(), make_recipe(scheme="W4A16", on_indivisible=way))
    assert ("0.weight" in results) is (expected is not None)
    assert results["2.weight"][0].spec == PRESETS["W4A16"].weight
    if way == "channel":
        assert results["0.weight"][0].spec == PRESETS["W4A16_CHANNEL"].weight
    if way == "pad":
        assert tuple(results["0.weight"][0].scale.shape) == (16, 1)


def test_nothing_is_changed_by_a_refusal():
    module = nn.Sequential(nn.Linear(128, 100), nn.Linear(100, 8))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(PlanError):
        bitgrain.quantize_(module, "W4A16")
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_what_cannot_be_done_is_one_clear_error():
    with pytest.raises(SchemeError, match="unknown scheme 'W4A61'"):
        bitgrain.quantize_(sequential(), "W4A61")
    with pytest.raises(SchemeError, match="FP8 has static activation scales"):
        bitgrain.quantize_(sequential(), "FP8")
    with pytest.raises(PlanError, match="no layer that this scheme would quantize"):
        bitgrain.quantize_(nn.Sequential(nn.ReLU()), "W8A16")
    broken = sequential()
    with torch.no_grad():
        broken[3].weight[1, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"3\.weight holds 1 NaN"):
        bitgrain.quantize_(broken, "W4A16")
    embedding = nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 4))
    rule = {"match": "Embedding", "scheme": "W8A8"}
    with pytest.raises(PlanError, match="token ids"):
        bitgrain.quantize_(embedding, make_recipe(scheme="W8A16", rules=[rule]))


def test_attention_of_torch_itself():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    with pytest.raises(
        PlanError, match=r"out_proj\.weight: torch's attention multiplies by it without calling its layer"
    ):
        bitgrain.quantize_(encoder, "W8A8")
    x = torch.randn(3, 7, 32)
    calibration, before = bitgrain.calibrate(encoder, [x]), encoder(x)
    results = bitgrain.quantize_(encoder, "W8A8_STATIC", calibration=calibration, keep=["out_proj"])
    assert list(results) == ["layers.0.linear1.weight", "layers.0.linear2.weight"]
    assert 0 < (encoder(x) - before).norm() / before.norm() < 0.02


def test_embeddings_can_be_named():
    embedding = nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 4))
    assert list(bitgrain.quantize_(embedding, "W8A16")) == ["1.weight"]
    rule = {"match": "Embedding", "scheme": "W8A16"}
    results = bitgrain.quantize_(embedding, make_recipe(scheme="W8A16", rules=[rule]))
    assert set(results) == {"0.weight", "1.weight"}


def test_transposed_layers_are_quantized_along_their_inputs():
    model: Any = zoo.build("gpt2")
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # Conv1D keeps [in, out]
    results = bitgrain.quantize_(model, "W4A16")
    expected = quantize(before.T.contiguous(), PRESETS["W4A16"].weight).dequantize().T
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, expected)
    assert not any("lm_head" in key or "wte" in key for key in results)


def test_a_shared_layer_is_quantized_once():
    torch.manual_seed(0)
    shared = nn.Linear(128, 128)
    alone = nn.Sequential(nn.Linear(128, 128))
    alone[0].load_state_dict(shared.state_dict())
    bitgrain.quantize_(alone, "W8A8")
    both = nn.Sequential(shared, nn.ReLU(), shared)
    bitgrain.quantize_(both, "W8A8")
    assert torch.equal(shared.weight, alone[0].weight)
    assert len(shared._forward_pre_hooks) == 1


def test_one_parameter_cannot_have_two_schemes():
    model: Any = zoo.build("llama-tied")
    rules = [{"match": "lm_head", "scheme": "W8A16"}, {"match": "embed_tokens", "scheme": "W4A16"}]
    with pytest.raises(PlanError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one parameter"):
        bitgrain.quantize_(model, make_recipe(scheme="W4A16", rules=rules))


def test_quantize_tensor_takes_names_schemes_and_specs():
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    spec = PRESETS["NVFP4"].weight
    expected = quantize(x, spec)
    for given in ("nvfp4", PRESETS["NVFP4"], spec):
        found = bitgrain.quantize_tensor(x, given)
        assert torch.equal(found.dequantize(), expected.dequantize())
    own = QuantSpec(get_format("nf4"), per_group(64))
    assert bitgrain.quantize_tensor(x, own).count_bits() == 6 * 256 * 4 + 24 * 32
    with pytest.raises(SchemeError):
        bitgrain.quantize_tensor(x, "nope")
    with pytest.raises(NumericsError, match="my weight holds"):
        bitgrain.quantize_tensor(x * float("inf"), "W8A16", name="my weight")
