"""`quantize_` on convolutions, and with calibration: static scales, solvers, first and last layer."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import bitgrain
from bitgrain.errors import PlanError, RecipeError, SchemeError, StatisticsError
from bitgrain.numerics import IntFormat, QuantSpec, per_channel, per_group, per_tensor, quantize
from bitgrain.numerics.granularity import Granularity
from bitgrain.numerics.observers import start, static_input, update
from bitgrain.numerics.ranges import MSE, MinMax, OutputSearch, Percentile, Weighted
from bitgrain.numerics.spec import nvfp4
from bitgrain.recipes import PRESETS, Scheme, make_recipe
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.runtime.convolutions import ConvolutionInput
from bitgrain.solvers import get_solver
from vision import images, network


def integers(bits: int, granularity: Granularity, **settings: Any) -> QuantSpec:
    return QuantSpec(IntFormat(bits), granularity, restricted=True, **settings)


def static(weight_bits: int, input_bits: int, **settings: Any) -> Scheme:
    return Scheme("mine", integers(weight_bits, per_channel()), integers(input_bits, per_tensor(), **settings))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def calibrated() -> tuple[nn.Sequential, Any]:
    net = network()
    return net, bitgrain.calibrate(net, images(32).split(8))


def using(scheme: Scheme | str, solver: str | dict[str, Any] = "rtn", **settings: Any) -> Any:
    return make_recipe(
        scheme=SchemeModel.of(scheme) if isinstance(scheme, Scheme) else scheme, solver=solver, **settings
    )


@pytest.mark.parametrize("granularity", [per_tensor(), per_channel(), per_group(9), Granularity(2, None)])
def test_the_weight_is_quantized_as_a_matrix(granularity: Granularity):
    net, original = network(), network()
    results = bitgrain.quantize_(net, Scheme("mine", integers(4, granularity)), keep=["6"])
    assert list(results) == ["0.weight", "3.wide.weight", "3.deep.weight"]
    for name, (q,) in results.items():
        weight = original.get_parameter(name)
        expected = quantize(weight.flatten(1), integers(4, granularity))
        assert torch.equal(q.codes, expected.codes)
        assert torch.equal(net.get_parameter(name), expected.dequantize().view(weight.shape))
    x = images(3)
    matrix = results["3.deep.weight"][0].dequantize()
    patches = F.unfold(x.expand(3, 8, 8, 8), 3, padding=1).view(3, 4, 18, 64)
    by_hand = torch.einsum("ngkp,gok->ngop", patches, matrix.view(4, 2, 18)).reshape(3, 8, 8, 8)
    found = net[3].deep(x.expand(3, 8, 8, 8)) - net[3].deep.bias.view(-1, 1, 1)
    torch.testing.assert_close(found, by_hand)


def test_a_transposed_convolution_has_its_own_axis():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    weight = layer.weight.detach().clone()
    ((q,),) = bitgrain.quantize_(nn.Sequential(layer), "W4A16_CHANNEL").values()
    assert q.codes.shape == (6, 18)
    for group in range(2):
        for row in range(3):
            of_channel = weight[2 * group : 2 * group + 2, row]  # all that makes one output channel
            expected = quantize(of_channel.reshape(1, -1), PRESETS["W4A16_CHANNEL"].weight).dequantize()
            assert torch.equal(layer.weight[2 * group : 2 * group + 2, row], expected.view(2, 3, 3))


@pytest.mark.parametrize("range", [MinMax(), Percentile(99.0), MSE()])
def test_static_scales_are_those_of_an_observer(calibrated: Any, range: Any):
    net, calibration = copy.deepcopy(calibrated[0]), calibrated[1]
    seen: list[Tensor] = []
    hook = net[3].wide.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in images(32).split(8):
        net(batch)
    hook.remove()
    scheme = static(8, 8, range=range)
    bitgrain.quantize_(net, scheme, calibration=calibration)
    state = start(range)
    for one in seen:
        state = update(state, one)
    expected = static_input(state, scheme.input)  # type: ignore[arg-type]
    found = net[3].wide.input_quantizer
    assert isinstance(found, ConvolutionInput)
    assert torch.equal(found.quantizer.static.scale, expected.scale)  # type: ignore[union-attr]
    x, step = images(4).expand(4, 8, 8, 8), expected.scale.item()
    rounded = (x / step).round().clamp(-128, 127) * step
    torch.testing.assert_close(net[3].wide(x), F.conv2d(rounded, net[3].wide.weight, padding=1))


def test_a_static_scale_for_each_channel_is_finer(calibrated: Any):
    net, calibration = calibrated
    x = images(64, 9)
    errors: dict[str, float] = {}
    for name, granularity in (("tensor", per_tensor()), ("channel", Granularity(None, 1))):
        copied = copy.deepcopy(net)
        spec = QuantSpec(IntFormat(4), granularity, "integer")
        bitgrain.quantize_(copied, Scheme("mine", integers(8, per_channel()), spec), calibration=calibration)
        errors[name] = float((copied(x) - net(x)).square().mean())
    assert errors["channel"] < errors["tensor"]
    found = copied[3].deep.input_quantizer.quantizer.static
    low, high = calibration.layers["3.deep.weight"].statistics.low, calibration.layers["3.deep.weight"].statistics.high
    torch.testing.assert_close(found.scale, ((high.clamp(min=0) - low.clamp(max=0)) / 15).view(1, -1))
    wrong = replace(spec, range=MSE())
    with pytest.raises(SchemeError, match="take range minmax"):
        bitgrain.quantize_(
            copy.deepcopy(net), Scheme("mine", integers(8, per_channel()), wrong), calibration=calibration
        )


def test_sixteen_bit_inputs_cost_nearly_nothing(calibrated: Any):
    net, calibration = calibrated
    x = images(32)  # those of the calibration: nothing is clipped
    errors: dict[int, float] = {}
    for bits in (4, 8, 16):
        copied = copy.deepcopy(net)
        recipe = using(Scheme("mine", QuantSpec(IntFormat(16), per_channel()), integers(bits, per_tensor())))
        bitgrain.quantize_(copied, recipe, calibration=calibration)
        errors[bits] = float((copied(x) - net(x)).square().mean().sqrt() / net(x).std())
    # a step is 2^8 and 2^4 times smaller
    assert errors[16] < errors[8] / 100
    assert errors[8] < errors[4] / 8
    assert errors[16] < 1e-4


def test_search_looks_at_the_outputs(calibrated: Any):
    net, calibration = copy.deepcopy(calibrated[0]), calibrated[1]
    bitgrain.quantize_(net, static(8, 4, range=OutputSearch()), calibration=calibration)
    for name, layer in (("3.deep", net[3].deep), ("6", net[6])):
        quantizer = layer.input_quantizer if name == "6" else layer.input_quantizer.quantizer
        largest = calibration.layers[f"{name}.weight"].statistics.absmax.max()
        assert 0.1 * largest / 7 < quantizer.static.scale < largest / 7


@pytest.mark.parametrize(
    "solver", ["gptq", "obq", "hqq", {"name": "gptq", "candidates": ["minmax", "weighted"], "sweeps": 2}]
)
def test_solvers_work_on_convolutions(calibrated: Any, solver: Any):
    net, calibration = calibrated
    name = solver if isinstance(solver, str) else solver["name"]
    plain, solved = copy.deepcopy(net), copy.deepcopy(net)
    scheme = Scheme("mine", integers(3, per_channel()))
    bitgrain.quantize_(plain, scheme)
    results = bitgrain.quantize_(solved, using(scheme, solver), calibration=calibration)
    assert [q.codes.shape for (q,) in results.values()] == [(8, 9), (8, 72), (8, 18), (10, 32)]
    for layer in ("3.wide", "3.deep"):
        weight = net.get_parameter(f"{layer}.weight").flatten(1)
        losses = []
        for other in (plain, solved):
            change = (other.get_parameter(f"{layer}.weight").flatten(1) - weight).chunk(
                len(calibration.layers[f"{layer}.weight"].moments)
            )
            moments = calibration.layers[f"{layer}.weight"].moments
            losses.append(sum(float((d @ m.hessian * d).sum()) for d, m in zip(change, moments, strict=True)))
        assert losses[1] < losses[0] * (0.8 if name != "hqq" else 1.2)  # hqq has another aim, and no data


def test_groups_of_a_convolution_are_solved_one_by_one(calibrated: Any):
    net, calibration = calibrated
    copied = copy.deepcopy(net)
    asymmetric = QuantSpec(IntFormat(3), per_channel(), "integer")
    ((q,),) = bitgrain.quantize_(
        copied, using(Scheme("m", asymmetric), "gptq"), calibration=calibration, keep=["0", "wide", "6"]
    ).values()
    assert torch.equal(copied[3].deep.weight, q.dequantize().view(8, 2, 3, 3))
    assert q.zero is not None
    moments = calibration.layers["3.deep.weight"].moments
    alone = [
        get_solver("gptq").solve(weight.flatten(1), asymmetric, one).q.dequantize()
        for weight, one in zip(net[3].deep.weight.detach().chunk(4), moments, strict=True)
    ]
    assert torch.equal(torch.cat(alone), q.dequantize())
    with pytest.raises(SchemeError, match=r"3\.deep\.weight is a convolution with groups"):
        bitgrain.quantize_(
            copy.deepcopy(net), using(Scheme("m", integers(4, per_tensor())), "gptq"), calibration=calibration
        )
    nested = Scheme("m", replace(nvfp4(), granularity=per_group(9)))
    ((q,),) = bitgrain.quantize_(
        copy.deepcopy(net), using(nested, "gptq"), calibration=calibration, keep=["0", "wide", "6"]
    ).values()
    assert q.dequantize().shape == (8, 18)


def test_importance_reaches_ranges(calibrated: Any):
    net, calibration = calibrated
    scheme = Scheme("mine", integers(3, per_channel(), range=Weighted()))
    with_data, without = copy.deepcopy(net), copy.deepcopy(net)
    bitgrain.quantize_(with_data, scheme, calibration=calibration)
    bitgrain.quantize_(without, scheme)
    assert not torch.equal(with_data[3].wide.weight, without[3].wide.weight)


def test_first_and_last_layer_are_kept_higher(calibrated: Any):
    net, calibration = calibrated
    results = bitgrain.quantize_(copy.deepcopy(net), "W4A16_CHANNEL", first_last="W8A16")
    assert [q.spec.format.bits for (q,) in results.values()] == [8, 4, 4, 8]
    assert list(bitgrain.quantize_(copy.deepcopy(net), "W8A8", first_last="keep")) == ["3.wide.weight", "3.deep.weight"]
    rules = [{"match": "@last", "keep": True}]
    kept = bitgrain.quantize_(copy.deepcopy(net), make_recipe(scheme="W8A8", rules=rules), calibration=calibration)
    assert list(kept) == ["0.weight", "3.wide.weight", "3.deep.weight"]


def test_the_order_is_that_of_running():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
            self.idle = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    torch.manual_seed(0)
    net = Backwards()
    kept = bitgrain.quantize_(copy.deepcopy(net), "W8A16", first_last="keep")
    assert list(kept) == ["middle.weight", "first.weight"]  # the module tree's order
    calibration = bitgrain.calibrate(net, [torch.randn(2, 4)])
    kept = bitgrain.quantize_(copy.deepcopy(net), "W8A16", calibration=calibration, first_last="keep")
    assert list(kept) == ["middle.weight", "idle.weight"]
    recipe = make_recipe(scheme="W8A16", rules=[{"match": "@last", "keep": True}])
    kept = bitgrain.quantize_(net, recipe, calibration=calibration)
    assert list(kept) == ["middle.weight", "first.weight", "idle.weight"]


def test_transformers_models_follow_the_disk_job():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).eval()
    assert list(bitgrain.quantize_(copy.deepcopy(model), "W8A8")) == ["classifier.1.weight"]
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibration = bitgrain.calibrate(model, [{"pixel_values": x}])
    with torch.no_grad():
        before = model(pixel_values=x).logits
        results = bitgrain.quantize_(model, "W8A8_STATIC", calibration=calibration, include=["Conv2d"])
        after = model(pixel_values=x).logits
    assert len(results) == 7
    assert 0 < (after - before).norm() / before.norm() < 0.05


def test_bad_input_is_one_clear_error_and_changes_nothing(calibrated: Any):
    net, calibration = copy.deepcopy(calibrated[0]), calibrated[1]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SchemeError, match=r"mine has static activation scales.*bitgrain\.calibrate\(module, batches\)"):
        bitgrain.quantize_(net, static(8, 8))
    with pytest.raises(SchemeError, match="calibrate first"):
        bitgrain.quantize_(net, using("W8A16", "gptq"))
    with pytest.raises(SchemeError, match="since the convolution sums over it"):
        bitgrain.quantize_(net, using("NVFP4", on_indivisible="pad"))
    with pytest.raises(SchemeError, match="outlier channels"):
        bitgrain.quantize_(net, "LLM_INT8")
    with pytest.raises(PlanError, match=r"per_group\(128\) does not divide 9 input features"):
        bitgrain.quantize_(net, "W4A16")
    with pytest.raises(RecipeError, match="transforms need the disk job"):
        bitgrain.quantize_(net, make_recipe(scheme="W8A16", transforms=["smoothquant"]))
    with pytest.raises(RecipeError, match="matches no layer"):
        bitgrain.quantize_(net, "W8A16", include=["Conv3d"])
    assert not any(part._forward_pre_hooks for part in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    bitgrain.quantize_(net, "W8A16")
    with pytest.raises(StatisticsError, match="before anything is quantized"):
        bitgrain.quantize_(net, "W8A16", calibration=calibration)
