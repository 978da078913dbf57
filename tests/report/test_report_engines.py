"""docs/engines.md is what the declarations give; and the generator knows exact from refused."""

import re
from pathlib import Path

import pytest

from bitgrain.checkpoints.layout import StoredLayer
from bitgrain.checkpoints.layouts import LAYOUTS
from bitgrain.recipes import PRESETS
from bitgrain.report.engines import HOLDERS, engine_tables_markdown, rows_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
BEGIN, END = "<!-- engines -->", "<!-- /engines -->"


def test_the_docs_have_the_tables():
    text = DOCS.read_text(encoding="utf-8")
    how = f"put the output of `bitgrain schemes --engines` into docs/engines.md between the lines {BEGIN} and {END}"
    assert BEGIN in text, how
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == engine_tables_markdown(), how


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_preset_is_held_or_refused(layout: str):
    rows = rows_of(layout)
    assert [row.scheme for row in rows] == list(PRESETS)
    assert all((row.held is None) == bool(row.refusal) == (not row.verdicts) for row in rows)


def test_reasons_say_nothing_of_the_sample():
    refused = {row.scheme: row.refusal for row in rows_of("compressed-tensors") if row.held is None}
    assert refused["TERNARY"] == refused["NF4"] == "compressed-tensors has no format for weights ..."
    text = engine_tables_markdown()
    assert re.search(
        r"^- TERNARY, NF4, .*GGUF_Q4_K.*: compressed-tensors has no format for weights \.\.\.$", text, re.M
    )
    assert text.count("exact") > text.count("refused (") > 0


def test_a_file_format_is_a_holder(monkeypatch: pytest.MonkeyPatch):
    def only_blocks_of_32(layer: StoredLayer) -> StoredLayer | str:
        return layer if layer.scheme.weight.granularity.cols == 32 else f"gguf has blocks, {layer.module} has none"

    monkeypatch.setitem(HOLDERS, "gguf", only_blocks_of_32)
    rows = {row.scheme: row for row in rows_of("gguf")}
    held = [name for name, row in rows.items() if row.held is not None]
    assert held == [name for name, scheme in PRESETS.items() if scheme.weight.granularity.cols == 32]
    assert held[:2] == ["MXFP4A16", "MXFP4"]
    loads = {verdict.engine: verdict.loads for verdict in rows["MXFP4A16"].verdicts}
    assert loads == {"vLLM": False, "SGLang": False, "transformers": False, "llama.cpp": True, "bitgrain": True}
    assert "### gguf\n" in engine_tables_markdown()
