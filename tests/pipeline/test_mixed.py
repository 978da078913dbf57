"""`--bits`: the budget is kept, what must share shares, rules hold, and the result is a recipe like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

import bitgrain
import zoo
from bitgrain.errors import BitgrainError, PlanError
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.gguf_types import GGUF_TYPES
from bitgrain.pipeline import mixed, weigh
from bitgrain.pipeline.plan import Plan
from bitgrain.progress import Progress

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]


def bits_of(plan: Plan) -> float:
    """Bits for each quantized weight, scales at 16 bits."""
    layers = plan.quantized.values()
    total = sum(x.experts * x.scheme.weight.with_scale_dtype(FP16).count_bits(x.shape) for x in layers)
    return total / sum(x.elements for x in layers)


def planned(model: Path, text: Path, **settings: Any) -> Plan:
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    return bitgrain.plan(model, calibration=calibration, workers=1, **settings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("bits", [2.6, 4.3])
def test_the_budget_is_kept_and_used(readable: Make, text: Path, name: str, bits: float):
    plan = planned(readable(name), text, bits=bits)
    assert bits - 0.35 < bits_of(plan) <= bits  # few layers: not every average can be had
    assert len({x.scheme.name for x in plan.quantized.values()}) > 1
    shared: dict[str, set[str]] = {}
    for layer in plan.layers:
        if layer.layer is not None and (layer.weight.fused or layer.weight.role == "expert"):
            group = layer.weight.fused or f"experts {layer.weight.block}"
            shared.setdefault(group, set()).add(layer.layer.scheme.name)
    assert shared or name in ("gpt2", "phi3")  # joined on disk already
    assert all(len(names) == 1 for names in shared.values())
    assert not plan.problems


def test_more_bits_are_predicted_to_cost_less(readable: Make, text: Path):
    draft = {"calibration": {"text": str(text), "windows": 5, "seqlen": 24}, "scheme": "W8A16"}
    recipe, quiet = bitgrain.recipes.make_recipe(**draft), bitgrain.progress.make_progress("quiet")
    found = [mixed.allocate_bits(readable("llama"), recipe, b, progress=quiet) for b in (2.4, 3.4, 5.4)]
    assert found[0].kl > found[1].kl > found[2].kl > 0
    assert [round(one.bits, 1) for one in found] == pytest.approx([2.4, 3.4, 5.4], abs=0.35)


def test_the_recipe_that_is_written_gives_the_same_bytes(readable: Make, text: Path, tmp_path: Path):
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    bitgrain.quantize(readable("llama"), tmp_path / "a", bits=3.2, recipe="fast", calibration=calibration)
    recipe = tmp_path / "a" / "recipe.yaml"
    assert len(yaml.safe_load(recipe.read_text())["rules"]) == 14
    bitgrain.quantize(readable("llama"), tmp_path / "b", recipe=recipe)
    both = [zoo.contents(tmp_path / name) for name in ("a", "b")]
    weights = [{name: data for name, data in one.items() if name.endswith(".safetensors")} for one in both]
    assert weights[0] == weights[1]
    assert not (tmp_path / "a.sensitivity.json").exists()


def test_engines_limit_the_choice(readable: Make, text: Path):
    plan = planned(readable("llama"), text, bits=6.0, engine="vllm")
    assert {x.scheme.weight.format.bits for x in plan.quantized.values()} <= {4, 8}
    with pytest.raises(BitgrainError, match="vllm"):
        planned(readable("llama"), text, bits=6.0, engine="vlllm")


def test_gguf_types_are_mixed_written_and_read(readable: Make, text: Path, tmp_path: Path):
    calibration = {"text": str(text), "windows": 5, "seqlen": 24}
    settings: dict[str, Any] = {"recipe": "balanced", "calibration": calibration}
    result = bitgrain.quantize(readable("llama"), tmp_path / "out", bits=4.7, engine="gguf", **settings)
    plan = result.plan
    assert 4.4 < bits_of(plan) <= 4.7
    assert plan.layout.name == "bitgrain"  # compressed-tensors holds no such codebook
    schemes = {x.scheme.name: x.scheme for x in plan.quantized.values()}
    assert len(schemes) > 1
    assert all(scheme.weight == GGUF_TYPES[name] and scheme.prescribed for name, scheme in schemes.items())
    original, loaded = (
        bitgrain.load(readable("llama"), device="cpu"),
        bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize"),
    )
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        wanted, found = original(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()


def test_kept_layers_and_those_with_a_scheme_stay_so(readable: Make, text: Path):
    plan = planned(readable("llama"), text, bits=4.0, keep=["o_proj"], fallback=["down_proj"])
    by_kind: dict[str, set[str]] = {}
    for name, layer in plan.quantized.items():
        by_kind.setdefault(name.split(".")[-2], set()).add(layer.scheme.name)
    assert "o_proj" not in by_kind
    assert by_kind["down_proj"] == {"W8A16"}
    assert bits_of(plan) <= 4.0
    assert all("W8A16" not in names for kind, names in by_kind.items() if kind != "down_proj")
    with pytest.raises(PlanError, match="less than is possible here"):
        planned(readable("llama"), text, bits=2.2, fallback=["down_proj", "up_proj", "gate_proj"])
    with pytest.raises(PlanError, match="no layer whose bits could be chosen"):
        planned(readable("llama"), text, bits=8.5, fallback=["Linear"])


@pytest.mark.parametrize(
    ("scheme", "falls_back_to"), [("W4A16", "W8A16"), ("W4A8", "W4A8_FALLBACK"), ("W4AFP8", "FP8_DYNAMIC")]
)
def test_fallback_follows_the_inputs(readable: Make, scheme: str, falls_back_to: str):
    plan = bitgrain.plan(readable("llama"), scheme, fallback=["down_proj"], keep=["model.layers.1.mlp.down_proj"])
    (only,) = [x.scheme for name, x in plan.quantized.items() if "down_proj" in name]
    assert only.name == falls_back_to
    assert only.weight.format.bits == 8
    others = next(x.scheme for name, x in plan.quantized.items() if "up_proj" in name)
    assert (only.input is None) == (others.input is None)
    assert not plan.problems


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # with a head of its own, and with a tied one
def test_what_is_included_is_chosen_for_too(readable: Make, text: Path, name: str):
    inside = planned(readable(name), text, bits=4.0)
    names = ["lm_head", "embed_tokens"] if name == "llama" else ["wte"]
    plan = planned(readable(name), text, bits=4.0, include=names)
    added = plan.quantized.keys() - inside.quantized.keys()
    assert len(added) == len(names)
    assert 3.6 < bits_of(plan) <= 4.0
    assert not plan.problems
    with pytest.raises(PlanError, match="vllm has no format that fits it"):
        planned(readable(name), text, bits=6.0, include=names, engine="vllm")


def test_an_embedding_that_is_included_has_no_inputs_to_round(readable: Make):
    plan = bitgrain.plan(readable("llama"), "W8A8", include=["lm_head", "embed_tokens"])
    inputs = {x.role: x.scheme.input for x in plan.quantized.values()}
    assert inputs["embedding"] is None
    assert inputs["lm_head"] == inputs["linear"] is not None
    assert not plan.problems


def test_a_killed_job_need_not_measure_again(readable: Make, text: Path, tmp_path: Path, monkeypatch):
    cache, measured = tmp_path / "x.json", list[int]()
    real = weigh.measure_costs

    def watched(*args: Any) -> Any:
        measured.append(1)
        return real(*args)

    monkeypatch.setattr(weigh, "measure_costs", watched)
    first = planned(readable("llama"), text, bits=3.2, cache=cache)
    again = planned(readable("llama"), text, bits=3.2, cache=cache)
    assert (len(measured), first.recipe) == (1, again.recipe)
    planned(readable("llama"), text, bits=3.2, cache=cache, keep=["o_proj"])  # another question
    assert len(measured) == 2


def test_a_budget_that_cannot_be(readable: Make, text: Path):
    with pytest.raises(BitgrainError, match=r"1\.1 bits a weight are less than is possible here, 2\.\d+: raise --bits"):
        planned(readable("llama"), text, bits=1.1)


def test_progress_is_told(readable: Make, text: Path):
    class Noted(Progress):
        told: ClassVar[list[str]] = []

        def start(self, total: float, unit: str = "", title: str = "", done: float = 0.0) -> None:
            self.told.append(title)

        def advance(self, amount: float = 1.0, note: str = "") -> None: ...

        def finish(self) -> None: ...

    planned(readable("llama"), text, bits=3.2, progress=Noted())
    assert any(title.startswith("weigh the layers of") for title in Noted.told)
