"""Rotations at run time through a whole job: written down, loaded again, resumed, tuned, and refused to others."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blockwise_resume import run_interrupted

import bitgrain
import zoo
from bitgrain.errors import CheckpointError
from calibrated_jobs import TUNED, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
ONLINE = [{"name": "rotate", "r4": True, "learn": 20}]


def logits(folder: Path) -> torch.Tensor:
    model = bitgrain.load(folder, device="cpu", dtype=torch.float32, execution="dequantize")
    return zoo.outputs(model, zoo.ids_for(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_written_computes_what_was_meant(readable: Make, text: Path, tmp_path: Path, name: str):
    transforms = ONLINE if name == "llama" else [{"name": "rotate", "r1": False, "r4": True}]
    result = run(readable(name), tmp_path / "out", recipe_of("fast", text, "W8A8", transforms=transforms))
    rotations = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["online_rotations"]
    assert len(rotations) == 2
    assert result.manifest["online_rotations"] == rotations
    before = logits(readable(name))
    assert float((logits(tmp_path / "out") - before).std() / before.std()) < 0.1
    assert {check.ok for check in bitgrain.verify(tmp_path / "out", against=readable(name))} <= {True, None}


def test_the_plan_says_who_can_run_it(readable: Make, text: Path):
    plan = bitgrain.plan(readable("llama"), recipe=recipe_of("fast", text, "W8A8", transforms=ONLINE))
    assert plan.layout.name == "bitgrain"
    assert {verdict.engine for verdict in plan.engines if verdict.loads} == {"bitgrain"}
    assert any("rotates inputs at run time" in note for note in plan.notes)
    plain = bitgrain.plan(readable("llama"), recipe=recipe_of("fast", text, "W8A8", transforms=["rotate"]))
    assert plain.layout.name == "compressed-tensors"


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("recipe", "changes"), [("balanced", {}), ("best", TUNED)])
def test_interrupted_anywhere_it_ends_in_the_same_bytes(
    readable: Make, text: Path, tmp_path: Path, recipe: str, changes: dict[str, Any], optional: bool
):
    transforms = [{**ONLINE[0], "optional": optional}]
    settings = recipe_of(recipe, text, "W8A8_STATIC", solver="gptq", transforms=transforms, **changes)
    run(readable("llama"), tmp_path / "whole", settings)
    out = tmp_path / "out"
    assert run_interrupted(readable("llama"), out, settings, itertools.count(2, 5)) >= 2
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")


def test_a_checkpoint_that_names_another_module(readable: Make, text: Path, tmp_path: Path):
    run(readable("llama"), tmp_path / "out", recipe_of("fast", text, "W8A8", transforms=ONLINE))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["online_rotations"]["model.layers.9.x"] = {"size": 8, "seed": 0}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.9\.x"):
        bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
