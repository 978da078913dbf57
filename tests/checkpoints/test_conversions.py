"""From layout to layout to layout, at random: the same numbers, or a refusal. Never a silent change.

BITGRAIN_CONVERSIONS asks for more than a run of the tests takes: `BITGRAIN_CONVERSIONS=10000`.
"""

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.checkpoints.layouts import WRITABLE
from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.errors import SchemeError
from bitgrain.numerics import QTensor
from bitgrain.numerics.respell import respell
from random_layers import random_layer, random_matrix

COUNT = int(os.environ.get("BITGRAIN_CONVERSIONS", "600"))


def through(layout: Layout, layer: StoredLayer, q: QTensor, folder: Path) -> tuple[StoredLayer, QTensor]:
    """Written by `layout` into a file in `folder`, and found again by it in config and file alone."""
    tensors = layout.encode(layer, [q])
    told = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in layout.tensors(layer)}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == told
    config = dict.fromkeys(layout.keys, layout.config([layer], []))
    kept = {"m.norm.weight": torch.ones(4, dtype=layer.dtype)}
    save_file({**tensors, **kept}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert layout.recognises(config)
    (found,) = layout.read_layers(config, checkpoint)
    assert found.tensor == layer.tensor
    assert found.shape == layer.shape
    (decoded,) = layout.decode(found, checkpoint.read)
    return found, decoded


def converted(layout: Layout, layer: StoredLayer, q: QTensor, folder: Path) -> tuple[StoredLayer, QTensor] | None:
    """`q` in `layout`, as a conversion does it; None if it is refused."""
    for spec in layout.spellings(layer):
        candidate = replace(layer, scheme=replace(layer.scheme, weight=spec))
        if layout.refusal(candidate) is None:
            try:
                said = q if spec == q.spec else respell(q, spec, layer.dtype)
            except SchemeError:
                continue
            return through(layout, candidate, said, folder)
    return None


def test_numbers_stay_the_same_from_layout_to_layout(tmp_path: Path):
    rng, done = random.Random(0), Counter[str]()
    tries = 0
    while done.total() < COUNT:
        tries += 1
        assert tries < 100 * COUNT
        layer = random_layer(rng)
        q = random_matrix(rng, layer)
        wanted = q.dequantize(layer.dtype)
        path = rng.choices(list(WRITABLE.values()), k=3)
        at = layer, q
        for layout in path:
            found = converted(layout, *at, tmp_path)
            if found is None:
                continue
            done[layout.name] += 1
            # readers may find another dtype for a layer whose scales do not tell it: the stated one counts
            assert torch.equal(found[1].dequantize(layer.dtype), wanted), (path, layer.scheme.weight)
            at = replace(found[0], dtype=layer.dtype), found[1]
    assert set(done) == set(WRITABLE)
