"""From layout to layout to layout, at random: the same numbers, or a refusal. Never a silent change.

BITGRAIN_CONVERSIONS asks for more than a run of the tests takes, BITGRAIN_SEED for others:
`BITGRAIN_CONVERSIONS=10000 BITGRAIN_SEED=1 pytest -s tests/checkpoints/test_conversions.py` prints how many went where.
"""

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from bitgrain.numerics.formats import FP16
from bitgrain.numerics.spec import int_weight
from bitgrain.recipes import PRESETS, Scheme
from conversion_steps import QUANTIZED, REACHED, STEPS, Held
from random_layers import random_layer, random_matrix

COUNT = int(os.environ.get("BITGRAIN_CONVERSIONS", "600"))
SEED = int(os.environ.get("BITGRAIN_SEED", "0"))
WEIGHTS = [4.0 if name == "gguf" else 1.0 if name == "bitgrain" or name.startswith("gguf:") else 3.0 for name in STEPS]
"""llama.cpp's types are many, and bitgrain takes everything."""
HOMES = [(Scheme(name, found.spec), "gguf") for name, found in QUANTIZED.items() if found.spec is not None]
HOMES += [(replace(PRESETS["W8A8"], weight=int_weight(8, scale=FP16)), name) for name in ("onnx-qdq", "bnb-int8")]
"""Schemes that few layers have, and what they go into first."""


def test_numbers_stay_the_same_from_layout_to_layout(tmp_path: Path):
    rng, done, tries = random.Random(SEED), Counter[str](), 0
    while done.total() < COUNT:
        assert tries < 100 * COUNT
        scheme, home = HOMES[tries // 6 % len(HOMES)] if tries % 6 == 0 else (None, "")
        tries += 1
        layer = random_layer(rng, scheme)
        held = first = Held.of(layer, *(random_matrix(rng, layer) for _ in range(layer.experts)))
        path = [home] * bool(home) + rng.choices(list(STEPS), WEIGHTS, k=3)
        for name in path:
            step = STEPS[name]
            taken = step.take(held, tmp_path)
            if taken is None:
                continue
            done[taken[0]] += 1
            found, dtype = taken[1], step.dtype(held.layer)
            assert torch.equal(found.numbers(dtype), held.numbers(dtype)), (path, name, held.layer.scheme.weight)
            assert torch.equal(found.numbers(layer.dtype), first.numbers(layer.dtype)), (path, layer.scheme.weight)
            held = replace(found, layer=replace(found.layer, dtype=dtype))
    print({name: done[name] for name in sorted(done)})
    assert set(done) == REACHED
