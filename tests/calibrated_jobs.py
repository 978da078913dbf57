"""Calibrated jobs on tiny models, as several tests run them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

import bitgrain
from bitgrain.pipeline.quantize import QuantizeResult, run_plan
from bitgrain.progress import Progress
from bitgrain.recipes import load_recipe

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12
SOLVER = {"name": "gptq", "candidates": ["minmax", "minmax*0.9"], "sweeps": 1}  # cheaper than that of the recipes
HEAD = {"match": "lm_head", "scheme": "W8A16"}
TUNED = {"tuning": {"end_to_end": {"steps": 3, "checks": 3, "validation": 2}}}


def recipe_of(name: str, text: Path, scheme: str = "W4A16", **changes: Any) -> Any:
    calibration = {"text": str(text), "windows": 5, "seqlen": 24, "batch": 2, **changes.pop("calibration", {})}
    return load_recipe(name, scheme=scheme, calibration=calibration, **changes)


def activations(which: str) -> dict[str, Any]:
    return {"calibration": {"activations": which}}


def run(model: Path, out: Path, recipe: Any, workers: int = 1, progress: Progress | None = None) -> QuantizeResult:
    plan = bitgrain.plan(model, recipe=recipe, workers=workers, max_shard_bytes=300_000)
    return run_plan(plan, out, progress=progress)


def layers_of(result: QuantizeResult) -> dict[str, dict[str, Any]]:
    return {layer["tensor"]: layer for layer in result.manifest["layers"] if layer["scheme"]}


def same_layers(one: Collection[Mapping[str, Any]], other: Collection[Mapping[str, Any]]) -> bool:
    """Whether two manifests say the same of their layers. What rounded inputs cost is measured on the device of a job
    with text, and on the CPU of one with saved statistics: its last digits may differ."""
    left, right = ([{**layer, "input_error": None} for layer in layers] for layers in (one, other))
    costs, others = ([layer.get("input_error", 0.0) for layer in layers] for layers in (one, other))
    return left == right and costs == pytest.approx(others, rel=1e-4)
