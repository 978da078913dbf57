from pathlib import Path

import pytest

from bitgrain.recipes import PRESETS, get_scheme
from bitgrain.report.schemes import describe_schemes, scheme_table_markdown, short_text

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- schemes -->", "<!-- /schemes -->"


def test_the_readme_has_the_table():
    text = README.read_text(encoding="utf-8")
    how = f"put the output of `bitgrain schemes --markdown` into README.md between the lines {BEGIN} and {END}"
    assert BEGIN in text, how
    assert END in text, how
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == scheme_table_markdown(), how


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W8A16", 8 + 16 / 4096),
        ("W4A16", 4 + 16 / 128),
        ("W4A16_ASYM", 4 + 16 / 128 + 4 / 128),
        ("W2A16_ASYM", 2 + 16 / 64 + 2 / 64),
        ("W8A16_TENSOR", 8),
        ("MXFP4", 4 + 8 / 32),
        ("NVFP4", 4 + 8 / 16),
        ("FP8_BLOCK", 8 + 16 / 128**2),
        ("LLM_INT8_STATIC", 8 + 16 / 4096 + 82 / 4096 * (16 + 32 / 4096)),
    ],
)
def test_bits_by_hand(name: str, bits: float):
    row = next(row for row in describe_schemes() if row.name == name)
    assert row.bits_per_weight == pytest.approx(bits, abs=2e-5)  # compressed-tensors also stores the shape


def test_every_preset_has_a_row():
    rows = {row.name: row for row in describe_schemes()}
    assert list(rows) == list(PRESETS)
    assert rows["W8A8"].aliases == ("INT8",)
    assert (rows["W8A8"].weights, rows["W8A8"].activations) == ("int8 channel", "int8 token")
    static = [name for name, row in rows.items() if row.needs_calibration]
    assert static == ["LLM_INT8_STATIC", "W8A8_STATIC", "W8A8_RPTQ", "W4A8_RPTQ", "W4A4_RPTQ", "FP8"]
    assert rows["W4A8_RPTQ"].activations == "int8 32 clusters asym static"
    assert (rows["NVFP4"].weights, rows["NVFP4"].on_disk) == ("fp4 g16 (e4m3)", "nvfp4-pack-quantized")
    assert rows["W8A16INT16"].on_disk == "bitgrain"
    assert rows["W4A16"].vllm
    assert rows["W3A16"].vllm
    assert not rows["W8A16_TENSOR"].vllm


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("W4A16_ASYM", "int4 g128 asym"),
        ("W8A8", "int8 channel/token"),
        ("W4A8", "int4 g128/int8 token"),
        ("W8A8_RPTQ", "int8 channel/32 clusters"),
        ("FP8_BLOCK", "fp8 128x128/g128"),
        ("W8A16_TENSOR", "int8 tensor"),
        ("LLM_INT8_STATIC", "int8 channel/token + 2 % 16-bit"),
    ],
)
def test_short_text(name: str, text: str):
    assert short_text(get_scheme(name)) == text


def test_the_markdown_is_a_table():
    lines = scheme_table_markdown().splitlines()
    assert {line.count("|") for line in lines[: len(PRESETS) + 2]} == {8}
    assert lines[1].count("---:") == 1
