"""Names of tensors in GGUF: there and back, for every architecture."""

from __future__ import annotations

import pytest
import torch

from bitgrain.checkpoints.gguf.architectures import ARCHITECTURES, Architecture, architecture_of_model
from bitgrain.checkpoints.gguf.names import LLAMA, Place, originals_of, place_of
from bitgrain.checkpoints.gguf.rotary import halved_rows, interleaved_rows, llama3_factors, llama3_rope
from bitgrain.errors import ModelError


@pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.model_type)
def test_every_name_comes_back(one: Architecture) -> None:
    originals = {
        f"{module.replace('{i}', str(i)).replace('{e}', str(e))}.{leaf}"
        for module in one.templates
        for i in (0, 11)
        for e in range(3)
        for leaf in ("weight", "bias")
    }
    places = {name: place_of(name, one.templates) for name in originals}
    assert None not in places.values()
    assert len(set(places.values())) == len(originals)
    names = {place.name for place in places.values() if place is not None}
    assert originals_of(names, 3, one.templates) == places


def test_names_without_their_first_part_and_unknown_ones() -> None:
    assert place_of("layers.3.mlp.up_proj.weight", LLAMA) == Place("blk.3.ffn_up.weight")
    assert place_of("model.layers.3.mlp.up_proj.weight_scale", LLAMA) is None
    assert place_of("model.layers.x.mlp.up_proj.weight", LLAMA) is None
    assert originals_of(["blk.0.ssm_a.weight", "v.blk.0.attn_q.weight"], 0, LLAMA) == {}


def test_an_unknown_architecture_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"OPTForCausalLM has no GGUF form .* LlamaForCausalLM, .* GPT2LMHeadModel"):
        architecture_of_model({"model_type": "opt", "architectures": ["OPTForCausalLM"]})


def test_rotated_rows_are_neighbours() -> None:
    order = interleaved_rows(16, 2)
    assert order.tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order[halved_rows(16, 2)].equal(torch.arange(16))
    with pytest.raises(ValueError, match="are not 3 heads"):
        interleaved_rows(16, 3)


def test_factors_of_llama_3_are_recognised() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(rope, 64)
    assert llama3_rope(factors, 500000.0) == rope
    assert llama3_rope(factors * 1.01, 500000.0) is None
