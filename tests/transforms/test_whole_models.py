"""Every transform, and several after each other, leave the function of whole models as it was."""

from __future__ import annotations

from typing import Any

import pytest

import zoo
from bitgrain.errors import ModelError
from bitgrain.transforms.proof import TOLERANCE, difference
from block_views import Blocks, build

ALL = ("absorb_bias", "fold_norms", "rotate", {"name": "smoothquant", "pairs": "all"})
"""Each leaves a state that the next must cope with."""
NAMES = ["llama", "qwen3", "gemma", "phi", "phi3", "gpt2", "opt", "mixtral", "qwen3-moe", "gpt-oss"]


@pytest.mark.parametrize("name", NAMES)
def test_all_one_after_the_other(name: str):
    model = build(name, tie_word_embeddings=False)
    blocks = Blocks(model)
    before = [zoo.outputs(model, ids) for ids in blocks.ids]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    blocks.apply(ALL)
    for ids, logits in zip(blocks.ids, before):
        assert difference(logits, zoo.outputs(model, ids)) < TOLERANCE
    changed = {key for key, value in model.state_dict().items() if not value.equal(weights[key])}
    matrices = {key for key, value in weights.items() if value.ndim > 1 and not key.endswith("bias")}
    assert changed >= matrices, matrices - changed


@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt2"])
@pytest.mark.parametrize(
    "choice",
    [
        "fold_norms",
        {"name": "rotate", "r1": False},
        "smoothquant",
        {"name": "awq", "grid": 2, "samples": 1},
        {"name": "balance", "steps": 3, "batch": 16},
    ],
    ids=lambda choice: choice if isinstance(choice, str) else choice["name"],
)
def test_transforms_that_every_model_allows(name: str, choice: str | dict[str, Any]):
    model = build(name)
    blocks = Blocks(model)
    before = zoo.outputs(model, blocks.ids[1])
    blocks.apply([choice])
    assert difference(before, zoo.outputs(model, blocks.ids[1])) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama-tied", "the model cannot be rotated: lm_head is tied with the embeddings"),
        ("bert", r"the model cannot be rotated: the output of the norm embeddings\.LayerNorm"),
    ],
)
def test_models_that_cannot_be_rotated(name: str, reason: str):
    with pytest.raises(ModelError, match=reason):
        Blocks(build(name)).apply(["rotate"])
