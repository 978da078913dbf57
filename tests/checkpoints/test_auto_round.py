"""What auto-round's own config.json says: which layout, which settings for which layer, and what is refused."""

from typing import Any

import pytest

from bitgrain.checkpoints.auto_round import auto_round_settings, packed_as
from bitgrain.checkpoints.layouts import layout_of
from bitgrain.errors import CheckpointError

OWN = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round", "gptq-v2"),
        ("auto_round:gptqmodel", "gptq-v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:llm_compressor", None),
        (None, None),
    ],
)
def test_each_packing_is_one_layout(packing: str | None, layout: str | None):
    own = OWN if packing is None else OWN | {"packing_format": packing}
    assert packed_as(own) == layout
    found = layout_of({"quantization_config": own})
    assert (found and found.name) == layout
    assert packed_as(own | {"quant_method": "gptq"}) is None


def test_what_differs_for_a_layer_is_told_by_name_or_by_expression():
    table = {
        "m.0.down": {"group_size": 32, "sym": None},
        r".*down.*": {"bits": 8},
        "lm_head": {"bits": 8, "act_bits": None, "data_type": "int"},
    }
    own = OWN | {"extra_config": table, "block_name_to_quantize": "m", "act_bits": 16}
    found = {name: auto_round_settings(name, own) for name in ("m.0.down", "m.1.down", "m.1.up", "lm_head")}
    settings = {name: (one["bits"], one["group_size"], one["sym"]) for name, one in found.items()}
    assert settings["m.0.down"] == (4, 32, True)
    assert settings["m.1.down"] == (8, 128, True)
    assert settings["m.1.up"] == (4, 128, True)
    assert settings["lm_head"] == (8, 128, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_type": "mx_fp"}, "codes of m.up are 'mx_fp'; integers are read"),
        ({"data_type": "fp8_e4m3"}, "codes of m.up are 'fp8_e4m3'"),
        ({"act_bits": 8, "act_dynamic": True}, "quantized the inputs of m.up to 8 bits"),
        ({"act_bits": "8"}, "quantized the inputs of m.up to '8' bits"),
        ({"extra_config": {"m.up": {"act_bits": 8}}}, "quantized the inputs of m.up to 8 bits"),
        ({"rotation_config": {"algorithm": "hadamard"}}, "rotated the inputs"),
        ({"extra_config": ["m.up"]}, "extra_config is no table of settings by module"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=words):
        auto_round_settings("m.up", OWN | changes)
