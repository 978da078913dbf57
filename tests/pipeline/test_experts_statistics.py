"""Saved statistics and the policies for experts: the same bytes as from text, or one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitgrain
import zoo
from bitgrain.calibration.statistics import layer_key, whole_key
from bitgrain.calibration.statistics_file import MANIFEST, open_statistics
from bitgrain.errors import ModelError, PlanError
from calibrated_jobs import activations, layers_of, recipe_of, run, same_layers

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
Saved = Callable[..., Path]
TEXT = {"windows": 5, "seqlen": 24, "batch": 2}


@pytest.fixture(scope="module")
def saved(readable: Make, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Statistics of a model, taken for a policy."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, policy: str, tokens: int | None = 50, workers: int = 1) -> Path:
        key = (name, policy, str(tokens), str(workers))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("statistics") / "-".join(key)
            calibration = {**TEXT, "text": str(readable(name).parent / "text.txt")}
            how = {"experts": {"policy": policy, "tokens": tokens}, "workers": workers}
            bitgrain.calibrate(readable(name), made[key], calibration=calibration, **how)
        return made[key]

    return make


def asked(text: Path, policy: str, tokens: int | None, **changes: Any) -> Any:
    return recipe_of("fast", text, experts={"policy": policy, "tokens": tokens}, **{**activations("full"), **changes})


@pytest.mark.parametrize(
    ("name", "taken", "policy", "tokens", "scheme"),
    [
        ("mixtral", ("borrow", 50), "borrow", 50, "W4A16"),
        ("mixtral", ("borrow", 50), "borrow", 30, "W4A16"),
        ("mixtral", ("borrow", 50), "nearest", 70, "W4A16"),
        ("mixtral", ("all", None), "all", None, "W4A16"),
        ("mixtral", ("all", None), "borrow", None, "W4A16"),
        ("gpt-oss", ("all", None), "all", 50, "W8A8_STATIC"),
        ("gpt-oss", ("borrow", 50), "borrow", 50, "W4A16"),
    ],
)
def test_the_same_as_from_text(
    name: str,
    taken: Any,
    policy: str,
    tokens: int | None,
    scheme: str,
    saved: Saved,
    readable: Make,
    text: Path,
    tmp_path: Path,
):
    source, statistics = readable(name), saved(name, *taken)
    recipe = asked(text, policy, tokens, scheme=scheme)
    by_text = run(source, tmp_path / "text", recipe)
    plan = bitgrain.plan(source, recipe=recipe, statistics=statistics, workers=2, max_shard_bytes=300_000)
    by_saved = bitgrain.pipeline.quantize.run_plan(plan, tmp_path / "saved")
    one, other = zoo.contents(tmp_path / "text"), zoo.contents(tmp_path / "saved")
    assert {file for file in one if one[file] != other[file]} <= {"README.md", "manifest.json"}
    assert same_layers(layers_of(by_saved).values(), layers_of(by_text).values())
    assert by_saved.manifest["experts"] == by_text.manifest["experts"]
    told = [note for note in by_text.manifest["notes"] if "tokens reached" in note]
    assert told
    assert [note for note in plan.notes if "tokens reached" in note] == told  # the plan knows already


@pytest.mark.parametrize(
    ("taken", "policy", "tokens", "words"),
    [
        (
            ("nearest", 50),
            "borrow",
            50,
            r"fewer than 50 tokens reached .*keep nothing that it could .*--experts nearest$",
        ),
        (("borrow", 50), "borrow", 60, r"calibrate again .*--expert-tokens 60, or .*nearest or --expert-tokens 50$"),
        (
            ("borrow", 50),
            "borrow",
            None,
            r"fewer than 512 tokens reached .* calibrate again with --experts borrow, or ask",
        ),
        (
            ("borrow", 50),
            "all",
            None,
            r"--experts all: the statistics .* were taken of the experts that the router chose",
        ),
        (("nearest", 50), "all", None, r"calibrate again with --experts all, or ask for another policy"),
    ],
)
def test_what_was_not_kept_is_asked_in_vain(
    taken: Any, policy: str, tokens: int | None, words: str, saved: Saved, readable: Make, text: Path, tmp_path: Path
):
    statistics = saved("mixtral", *taken)
    plan = bitgrain.plan(readable("mixtral"), recipe=asked(text, policy, tokens), statistics=statistics)
    assert len(plan.problems) == 1
    with pytest.raises(PlanError, match=words):
        bitgrain.pipeline.quantize.run_plan(plan, tmp_path / "out")
    rounded = asked(text, policy, tokens, solver="rtn")  # which needs none of it
    assert bitgrain.plan(readable("mixtral"), recipe=rounded, statistics=statistics).problems == ()


def test_statistics_from_before_there_were_policies(saved: Saved, readable: Make, text: Path, tmp_path: Path):
    """They say nothing of experts: what the router chose is all that they hold."""
    old = tmp_path / "old"
    old.mkdir()
    for file in saved("mixtral", "nearest").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["settings"]["experts"]
    (old / MANIFEST).write_text(json.dumps(manifest))
    assert bitgrain.plan(readable("mixtral"), recipe=asked(text, "nearest", 50), statistics=old).problems == ()
    (problem,) = bitgrain.plan(readable("mixtral"), recipe=asked(text, "borrow", 50), statistics=old).problems
    assert "keep nothing that it could borrow" in problem


@pytest.mark.parametrize("policy", ["borrow", "all", "nearest"])
def test_what_is_kept(policy: str, saved: Saved):
    """Beside what each expert saw, what all tokens would show it: of the layer's input once, of the rest for each."""
    stored = open_statistics(saved("mixtral", policy))
    assert stored.about.settings["experts"] == {"policy": policy, "tokens": 50}
    for part, width in (("gate_up_proj", 128), ("down_proj", 256)):
        names = [layer_key(f"model.layers.0.mlp.experts.{part}", i) for i in range(4)]
        few = [name for name in names if name not in stored or stored.tokens(name) < 50]
        assert 0 < len(few) < 4
        kept = [name for name in names if whole_key(name) in stored]
        assert kept == {"borrow": few, "all": names, "nearest": []}[policy]
        places = {stored.place(whole_key(name)) for name in kept}
        assert len(places) == (1 if part == "gate_up_proj" and kept else len(kept))
        for name in kept:
            found = stored.read(whole_key(name))
            assert found.tokens == 5 * 24
            assert found.hessian is not None
            assert found.hessian.shape == (width, width)
            least = stored.read(name).high if name in stored else found.low
            assert bool((found.high >= least - 1e-5).all())  # of other batches, whose products may have other last bits
    routed = [stored.read(layer_key("model.layers.0.mlp.experts.gate_up_proj", i)).tokens for i in range(4)]
    assert sum(routed) == 2 * 5 * 24


def test_of_all_tokens_the_mean_is_that_of_the_parts(saved: Saved):
    """Each token goes to two experts: what they saw together, is twice what all see of the layer's input."""
    stored = open_statistics(saved("mixtral", "all"))
    names = [layer_key("model.layers.1.mlp.experts.gate_up_proj", i) for i in range(4)]
    whole = stored.read(whole_key(names[0])).moments
    parts = [stored.read(name).moments for name in names]
    total = sum((one.hessian.double() * one.tokens for one in parts), torch.zeros(128, 128).double())
    assert torch.allclose(total / (2 * whole.tokens), whole.hessian.double(), atol=1e-5)


@pytest.mark.parametrize("policy", ["borrow", "all"])
def test_a_folder_is_the_same_for_any_number_of_workers(policy: str, saved: Saved):
    assert zoo.contents(saved("gpt-oss", policy, workers=1)) == zoo.contents(saved("gpt-oss", policy, workers=3))


def test_a_layer_that_cannot_be_asked(readable: Make, text: Path, tmp_path: Path):
    calibration = {**TEXT, "text": str(text)}
    with pytest.raises(ModelError, match="not told by indices"):
        bitgrain.calibrate(readable("llama4"), tmp_path / "all", calibration=calibration, experts="all")
    assert list(tmp_path.iterdir()) == []
    bitgrain.calibrate(readable("llama4"), tmp_path / "out", calibration=calibration, experts="borrow")
    recipe = asked(text, "borrow", 40, on_indivisible="channel")
    assert bitgrain.plan(readable("llama4"), recipe=recipe, statistics=tmp_path / "out").problems == ()
