"""ZeroQuant's recipe: groups, tokens, and layer-by-layer distillation through a whole job."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_blockwise_resume import run_interrupted

import bitgrain
import zoo
from bitgrain.calibration.text import load_tokenizer
from bitgrain.calibration.windows import calibration_windows
from bitgrain.recipes import load_recipe
from calibrated_jobs import layers_of, recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
BRIEF = {"blockwise": {**(load_recipe("zeroquant", scheme="W4A8").tuning.blockwise or {}), "steps": 16}}


def test_distilled_blocks_come_nearer(readable: Make, text: Path, tmp_path: Path):
    model = readable("llama")
    ids = calibration_windows(text, load_tokenizer(model), windows=5, seqlen=24).ids
    before = zoo.outputs(bitgrain.load(model, device="cpu"), ids)
    errors: list[float] = []
    for name, changes in (("plain", {"tuning": {"blockwise": None}}), ("distilled", {"tuning": BRIEF})):
        result = run(model, tmp_path / name, recipe_of("zeroquant", text, "W4A8", **changes))
        after = zoo.outputs(bitgrain.load(tmp_path / name, device="cpu", execution="dequantize"), ids)
        errors.append(float((after - before).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    told = [layer["tuning"] for layer in layers_of(result).values()]
    assert all(one["error_after"] < 0.9 * one["error_before"] for one in told)
    assert {check.ok for check in bitgrain.verify(tmp_path / "distilled", against=model)} <= {True, None}
    plain, distilled = (zoo.read_tensors(tmp_path / name) for name in ("plain", "distilled"))
    assert plain.keys() == distilled.keys()
    assert all(torch.equal(plain[key], distilled[key]) for key in plain if key.endswith("weight_scale"))


def test_interrupted_it_ends_in_the_same_bytes(readable: Make, text: Path, tmp_path: Path):
    settings = recipe_of("zeroquant", text, "W4A8", tuning=BRIEF)
    run(readable("llama"), tmp_path / "whole", settings)
    out = tmp_path / "out"
    assert run_interrupted(readable("llama"), out, settings, itertools.count(4, 8))
    assert zoo.contents(out) == zoo.contents(tmp_path / "whole")
