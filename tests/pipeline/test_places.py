"""Where quantized weights run packed: read off the model and off transformers' own rules for names on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.models import build_skeleton, load_config, read_anatomy, resolve_model
from bitgrain.models.naming import convert_tensors
from bitgrain.pipeline.places import Place, find_places
from bitgrain.pipeline.stored import QuantizedCheckpoint


def places_of(folder: Path) -> tuple[QuantizedCheckpoint, torch.nn.Module, list[Place], dict[str, str]]:
    stored = QuantizedCheckpoint(folder)
    skeleton = build_skeleton(load_config(resolve_model(folder), False, drop_quantization=True), False)
    return stored, skeleton, *find_places(skeleton, read_anatomy(skeleton, stored.originals()), stored.layers)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_are_made_of_what_transformers_makes_them_of(tiny: Callable[[str], Path], tmp_path: Path, name: str):
    bitgrain.quantize(tiny(name), tmp_path / "out", "W8A16")
    stored, skeleton, places, reasons = places_of(tmp_path / "out")
    assert not reasons
    stacks = [place for place in places if place.kind == "experts"]
    assert len(stacks) == 4
    assert sorted(name for place in places for name in place.tensors) == sorted(stored.layers)
    for place in stacks:
        dense = convert_tensors(skeleton, {name: stored.dense(name) for name in place.tensors})[place.target]
        matrices = {name: stored.quantized(name) for name in place.tensors}
        for expert, parts in zip(dense, place.parts, strict=True):
            joined = torch.cat([matrices[name][i].dequantize() for name, i in parts])
            assert joined.equal(expert.T if place.transposed else expert)


def test_embeddings_with_and_without_a_head(tiny: Callable[[str], Path], tmp_path: Path):
    for name, kind, paths in (
        ("llama", "embedding", ("model.embed_tokens",)),
        ("llama-tied", "tied", ("lm_head", "model.embed_tokens")),
    ):
        bitgrain.quantize(tiny(name), tmp_path / name, "W8A16", include=["model.embed_tokens"])
        _, _, places, reasons = places_of(tmp_path / name)
        assert not reasons
        (found,) = [place for place in places if place.kind != "linear"]
        assert (found.kind, found.paths, found.tensors) == (kind, paths, ("model.embed_tokens.weight",))


def test_experts_of_which_some_are_kept_have_no_place(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", "W8A16", keep=["w1"])
    _, _, places, reasons = places_of(tmp_path / "out")
    assert {name.split(".")[-2] for name in reasons} == {"w3"}
    assert set(reasons.values()) == {"experts that are stacked in a way of their own, or in part"}
    assert [place.target.split(".")[-1] for place in places if place.kind == "experts"] == ["down_proj"] * 2
