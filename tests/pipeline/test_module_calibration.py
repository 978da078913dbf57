"""Calibration in memory: what each layer of any module is given."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitgrain
import zoo
from bitgrain.errors import NumericsError, RecipeError, SchemeError, StatisticsError
from bitgrain.numerics.observers import start, update
from bitgrain.numerics.ranges import KL, MSE, MinMax, MovingAverage, Percentile
from bitgrain.pipeline.modules.calibrate import ROWS
from bitgrain.recipes import make_recipe
from vision import images, network


def inputs_of(net: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """What a plain hook sees."""
    seen: dict[str, list[Tensor]] = {}
    for name, part in net.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return seen


def test_what_each_layer_is_given():
    net, batches = network(), [images(4, 1), images(3, 2)]
    calibration = bitgrain.calibrate(net, batches)
    assert calibration.batches == 2
    assert calibration.order == ("0.weight", "3.wide.weight", "3.deep.weight", "6.weight")
    for name, given in inputs_of(copy.deepcopy(net), batches).items():
        found, x = calibration.layers[f"{name}.weight"], torch.cat(given)
        channels = x.movedim(1, -1).reshape(-1, x.shape[1])
        assert found.statistics.tokens == len(channels)
        torch.testing.assert_close(found.statistics.low, channels.amin(0))
        torch.testing.assert_close(found.statistics.high, channels.amax(0))
        torch.testing.assert_close(found.statistics.mean_abs, channels.abs().mean(0))
        for range in (MinMax(), MovingAverage(), Percentile(), MSE(), KL()):
            state = start(range)
            for one in given:
                state = update(state, one)
            observed = found.statistics.observed(range)
            assert (observed.low, observed.high, observed.elements) == (state.low, state.high, state.elements)
            assert (observed.counts is None) == (state.counts is None)
            assert observed.counts is None or torch.equal(observed.counts, state.counts)


def test_moments_are_those_of_the_unfolded_input():
    net, batches = network(), [images(4, 1), images(3, 2)]
    calibration = bitgrain.calibrate(net, batches)
    seen = inputs_of(copy.deepcopy(net), batches)
    for name, groups in (("3.wide", 1), ("3.deep", 4)):
        patches = F.unfold(torch.cat(seen[name]), 3, padding=1)  # torch's own: [samples, channels * 9, positions]
        rows = patches.transpose(1, 2).flatten(0, 1)
        moments = calibration.layers[f"{name}.weight"].moments
        assert len(moments) == groups
        for group, one in zip(rows.chunk(groups, 1), moments, strict=True):
            assert one.tokens == len(rows)
            torch.testing.assert_close(one.hessian, group.T @ group / len(rows), rtol=1e-4, atol=1e-5)
        drawn = calibration.layers[f"{name}.weight"].rows
        assert len(drawn) == min(ROWS, len(rows))
        assert all((rows == one).all(-1).any() for one in drawn[:20])
    (linear,) = calibration.layers["6.weight"].moments
    x = torch.cat(seen["6"])
    torch.testing.assert_close(linear.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_neither_order_nor_cuts_matter():
    net, x = network(), images(12)
    whole = bitgrain.calibrate(net, [x])
    cut = bitgrain.calibrate(net, x.split(5))
    turned = bitgrain.calibrate(net, list(x.split(4))[::-1])
    for name, one in whole.layers.items():
        for other in (cut.layers[name], turned.layers[name]):
            assert torch.allclose(one.statistics.low, other.statistics.low, atol=1e-5)
            assert one.statistics.tokens == other.statistics.tokens
            for a, b in zip(one.moments, other.moments, strict=True):
                torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.rows, cut.layers[name].rows, rtol=1e-4, atol=1e-4)
    first = whole.layers["0.weight"]  # its inputs do not depend on how torch multiplies batches
    for other in (cut.layers["0.weight"], turned.layers["0.weight"]):
        assert torch.equal(first.statistics.counts, other.statistics.counts)  # type: ignore[arg-type]
    assert torch.equal(first.moments[0].hessian, cut.layers["0.weight"].moments[0].hessian)
    assert torch.equal(first.rows, cut.layers["0.weight"].rows)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.left(a) if b is None else self.left(a) + self.right(b)


def test_batches_are_what_the_module_is_called_with():
    torch.manual_seed(0)
    net, a, b = Pair(), torch.randn(3, 4), torch.randn(3, 4)
    by_place = bitgrain.calibrate(net, [(a, b)])
    by_list = bitgrain.calibrate(net, iter([[a, b]]))
    by_name = bitgrain.calibrate(net, [{"a": a, "b": b}])
    for name in ("left.weight", "right.weight"):
        expected = by_place.layers[name].statistics
        for other in (by_list, by_name):
            assert torch.equal(other.layers[name].statistics.low, expected.low)
    assert list(bitgrain.calibrate(net, [a]).layers) == ["left.weight"]


def test_the_module_is_left_as_it_was():
    net = network()
    net.train()
    net[3].norm2.eval()
    before = copy.deepcopy(net.state_dict())
    bitgrain.calibrate(net, [images(4)])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [part.training for part in net.modules()].count(False) == 1
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_a_language_model_with_stacked_experts():
    model: Any = zoo.build("mixtral")
    ids = zoo.ids_for(model)
    calibration = bitgrain.calibrate(model, [{"input_ids": ids}])
    tokens = calibration.layers["model.layers.0.self_attn.q_proj.weight"].statistics.tokens
    assert tokens == ids.numel()
    stack = "model.layers.0.mlp.experts.down_proj"
    experts = [calibration.layers[f"{stack}[{i}]"].statistics.tokens for i in range(4)]
    assert sum(experts) == calibration.layers[stack].statistics.tokens == 2 * tokens
    results = bitgrain.quantize_(model, "W8A8_STATIC", calibration=calibration)
    assert len(results[stack]) == 4
    assert zoo.outputs(model, ids).isfinite().all()


def test_bad_batches_are_one_clear_error():
    net = network()
    with pytest.raises(SchemeError, match="not one Tensor: pass a list"):
        bitgrain.calibrate(net, images(4))
    with pytest.raises(SchemeError, match="there are no calibration batches"):
        bitgrain.calibrate(net, [])
    with pytest.raises(NumericsError, match=r"the inputs of 0\.weight hold 1 NaN"):
        bitgrain.calibrate(net, [images(2), poisoned()])
    with pytest.raises(RecipeError, match="calibrated by batches"):
        bitgrain.calibrate(net, "folder")  # type: ignore[call-overload]
    with pytest.raises(RecipeError, match="where it is"):
        bitgrain.calibrate(net, [images(2)], device="cpu")  # type: ignore[call-overload]
    with pytest.raises(RecipeError, match="batches are for a module in memory"):
        bitgrain.calibrate("MODEL", [images(2)])  # type: ignore[call-overload]
    assert not any(part._forward_pre_hooks for part in net.modules())


def poisoned() -> Tensor:
    x = images(2)
    x[1, 0, 2, 3] = float("nan")
    return x


def test_another_module_is_refused():
    net = network()
    calibration = bitgrain.calibrate(net, [images(4)])
    bitgrain.quantize_(copy.deepcopy(net), "W8A8", calibration=calibration)  # a copy is the same module
    for other in (network(seed=1), network(channels=4), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(StatisticsError, match="this calibration is of another module"):
            bitgrain.quantize_(other, "W8A8", calibration=calibration)


def test_a_layer_that_no_batch_reaches():
    torch.manual_seed(0)
    net = Pair()
    calibration = bitgrain.calibrate(net, [torch.randn(3, 4)])
    for scheme, solver in (("W8A8_STATIC", "rtn"), ("W8A16", "gptq")):
        recipe = make_recipe(scheme=scheme, solver=solver)
        with pytest.raises(StatisticsError, match=r"right\.weight: none of the 1 calibration batches reached it"):
            bitgrain.quantize_(net, recipe, calibration=calibration)
        results = bitgrain.quantize_(copy.deepcopy(net), recipe, calibration=calibration, keep=["right"])
        assert list(results) == ["left.weight"]
    assert list(bitgrain.quantize_(net, "W8A8", calibration=calibration)) == ["left.weight", "right.weight"]


def test_moments_can_be_left_out():
    for net, batch in ((network(), images(4)), (zoo.build("mixtral"), {"input_ids": torch.arange(24).view(2, 12)})):
        calibration = bitgrain.calibrate(net, [batch], moments=False)
        assert not any(layer.moments for layer in calibration.layers.values())
        assert bitgrain.quantize_(copy.deepcopy(net), "W8A8_STATIC", calibration=calibration)
        with pytest.raises(SchemeError, match="calibrate first"):
            bitgrain.quantize_(net, make_recipe(scheme="W8A16", solver="gptq"), calibration=calibration)
