"""The tables of an inspection: what stands in them, and that they fit."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitgrain.evaluation.inspection.activations import ActivationInspection, ActivationLoss
from bitgrain.evaluation.inspection.channels import ChannelRange, ChannelRanges
from bitgrain.evaluation.inspection.job import Inspection, TextUse, inspect_model
from bitgrain.evaluation.inspection.weights import inspect_matrix
from bitgrain.report.inspection import render_inspection


def rendered(inspection: Inspection, width: int = 100, terminal: bool = False, **options: bool) -> str:
    out = io.StringIO()
    render_inspection(inspection, Console(file=out, width=width, force_terminal=terminal), **options)
    return out.getvalue()


@pytest.fixture
def inspection() -> Inspection:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for block in range(12):
        for kind in ("self_attn.q_proj", "mlp.down_proj"):
            weight = torch.randn(128, 256, generator=generator)
            if kind == "mlp.down_proj" and block in (3, 4, 7):
                weight[:, 5] *= 40
            module = f"model.layers.{block}.{kind}"
            layers.append(replace(inspect_matrix(weight), module=module, kind=kind, block=block))
    return Inspection("toy", None, "ToyForCausalLM", 3.0, tuple(layers), notes=("a note with [brackets]",))


def activation(name: str, token: float) -> ActivationInspection:
    top = (ChannelRange(17, -80.0, 90.0), ChannelRange(3, -1.0, 70.0))
    channels = ChannelRanges(256, 90.0, 1.0, 0.5, 90.0, 2, 0, top)
    names = (("per_tensor", False), ("per_token", True), ("per_channel", False), ("per_group(128)", True))
    losses = [
        ActivationLoss(granularity, format, dynamic, token / 2, 40.0 if granularity == "per_channel" else token)
        for format in ("int8", "fp8_e4m3")
        for granularity, dynamic in names
    ]
    return ActivationInspection(
        f"model.layers.0.{name}", name, 0, (name,), 256, 1024, 0, 90.0, 0.0, 99.0, channels, tuple(losses)
    )


def test_summary_first_then_the_worst_then_the_recommendation(inspection: Inspection):
    text = rendered(inspection)
    places = [text.index(part) for part in ("Weights by kind", "The 10 layers that lose most", "Recommendation")]
    assert places == sorted(places)
    assert "mlp.down_proj in blocks 3-4, 7" in text
    assert "a note with [brackets]" in text
    assert "model.layers.0.self_attn.q_proj" not in text.split("Recommendation")[0]


def test_all_shows_each_layer(inspection: Inspection):
    text = rendered(inspection, all_layers=True)
    assert all(layer.module in text for layer in inspection.layers)


def test_it_fits_and_is_plain_off_a_terminal(inspection: Inspection):
    sites = (
        activation("self_attn.q_proj", 20.0),
        activation("self_attn.k_proj", 20.0),
        activation("mlp.up_proj", 39.0),
    )
    full = replace(inspection, activations=sites, text=TextUse(512, 2, 1024))
    text = rendered(full, all_layers=True)
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" in rendered(full, terminal=True)
    assert max(len(line) for line in rendered(full, width=80).splitlines()) <= 80


def test_inputs_that_layers_share_are_shown_once(inspection: Inspection):
    sites = (
        activation("self_attn.q_proj", 20.0),
        activation("self_attn.k_proj", 20.0),
        activation("mlp.up_proj", 39.0),
    )
    text = rendered(replace(inspection, activations=sites, text=TextUse(512, 2, 1024)))
    assert "model.layers.0.self_attn.q_proj +1" in text
    assert "self_attn.k_proj" not in text
    assert "in 1 of 2 inputs, most in model.layers.0.self_attn.q_proj +1: 20.0 dB" in " ".join(text.split())
    assert "17 3" in text


def test_damaged_exact_and_unseen_are_said():
    zero = replace(inspect_matrix(torch.zeros(4, 4)), module="zero", kind="zero")
    damaged = replace(inspect_matrix(torch.full((4, 4), math.nan)), module="bad", kind="bad")
    unseen = ActivationInspection("quiet", "quiet", None, ("quiet",), 4, 0, 0, None, None, None, None, ())
    text = rendered(Inspection("toy", None, "Toy", 3.0, (zero, damaged), (unseen,), TextUse(8, 1, 8)), all_layers=True)
    assert "exact" in text
    assert "NaN" in text
    assert "quiet" in text
    assert "All zero: 4 output and 4 input channels" in text


def test_a_real_model(shared: Path):
    found = inspect_model(shared / "models" / "stories260k")
    text = rendered(found)
    assert "mlp.down_proj" in text
    assert max(len(line) for line in text.splitlines()) <= 100
