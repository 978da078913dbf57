"""`--keep 5%` and `--fallback 20%`: what is spared is what costs most, within the share, and joined layers together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitgrain
from bitgrain.errors import PlanError, RecipeError
from bitgrain.pipeline import sensitive
from bitgrain.pipeline.blockwise.sensitivity import Costs
from bitgrain.pipeline.plan import Plan

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]


def planned(model: Path, text: Path, scheme: str, **settings: Any) -> Plan:
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    return bitgrain.plan(model, scheme, calibration=calibration, workers=1, **settings)


def part(plan: Plan, names: set[str]) -> float:
    sizes = {weight.tensor: weight.elements for weight in plan.anatomy.weights if weight.role in ("linear", "expert")}
    return sum(sizes[name] for name in names) / sum(sizes.values())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_shares_are_kept_to(readable: Make, text: Path, name: str):
    everything = planned(readable(name), text, "W4A8")
    plan = planned(readable(name), text, "W4A8", keep=["10%"], fallback=["30%"])
    kept = everything.quantized.keys() - plan.quantized.keys()
    fallen = {tensor for tensor, x in plan.quantized.items() if x.scheme.name == "W4A8_FALLBACK"}
    assert kept
    assert fallen
    assert 0 < part(plan, kept) <= 0.10
    assert 0 < part(plan, fallen) <= 0.30
    for group in {weight.fused for weight in plan.anatomy.weights if weight.fused}:
        members = {weight.tensor for weight in plan.anatomy.weights if weight.fused == group}
        assert members <= kept or not members & kept
        assert members <= fallen or not members & fallen
    assert any("most sensitive layers" in note and "kept" in note for note in plan.notes)
    assert not plan.problems


def test_the_dearest_are_chosen(readable: Make, text: Path, monkeypatch: pytest.MonkeyPatch):
    def weighed(plan: Plan, layers: Any, *_: Any, **__: Any) -> Costs:
        dear = {name: 1.0 + ("1.mlp.down" in name) * 9 + ("0.self_attn.o" in name) * 5 for name in layers}
        return Costs({name: [cost, cost / 10] for name, cost in dear.items()}, dict.fromkeys(layers, 0.5))

    monkeypatch.setattr(sensitive, "weigh", weighed)
    everything = planned(readable("llama"), text, "W4A8")
    size = part(everything, {"model.layers.1.mlp.down_proj.weight"}) + 1e-9
    plan = planned(readable("llama"), text, "W4A8", keep=[f"{100 * size}%"])
    assert everything.quantized.keys() - plan.quantized.keys() == {"model.layers.1.mlp.down_proj.weight"}
    plan = planned(readable("llama"), text, "W4A8", keep=["down_proj"], fallback=[f"{100 * size}%"])
    fallen = {name for name, x in plan.quantized.items() if x.scheme.name == "W4A8_FALLBACK"}
    assert "model.layers.0.self_attn.o_proj.weight" in fallen
    assert not any("down_proj" in name for name in plan.quantized)


def test_what_costs_nothing_to_lose_is_not_spared(readable: Make, text: Path):
    plan = planned(readable("llama"), text, "W8A16", fallback=["50%"])  # eight bits already
    assert any("0 most sensitive layers" in note for note in plan.notes)


@pytest.mark.parametrize("share", ["0%", "100%", "-3%", "x%", "%", "nan%"])
def test_no_share(readable: Make, share: str):
    with pytest.raises(RecipeError, match="one percentage between 0% and 100%"):
        bitgrain.plan(readable("llama"), "W4A16", keep=[share])


def test_what_cannot_go_together(readable: Make, text: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="one percentage"):
        bitgrain.plan(readable("llama"), "W4A16", fallback=["3%", "4%"])
    with pytest.raises(RecipeError, match="weighs every layer itself"):
        planned(readable("llama"), text, "W4A16", bits=4, fallback=["3%"])
    with pytest.raises(RecipeError, match="need gradients, which statistics do not hold"):
        bitgrain.plan(readable("llama"), "W4A16", statistics=tmp_path, keep=["3%"])
    with pytest.raises(PlanError, match="no layer that could be spared"):
        planned(readable("llama"), text, "W4A16", fallback=["Linear", "3%"])
