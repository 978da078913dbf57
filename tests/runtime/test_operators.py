"""The operator table: the row for the device goes first, and what has none is said."""

from pathlib import Path

import pytest
import torch

import zoo
from bitgrain.errors import SchemeError
from bitgrain.runtime import linear_rows, operators  # noqa: F401 (its rows)
from bitgrain.runtime.attention import SCHEMES, attend, set_attention
from bitgrain.runtime.operators import Operator, find_operator, register_operator


def test_every_attention_scheme_has_its_reference():
    for scheme in SCHEMES.values():
        row = find_operator("attention", scheme.formats, "cuda")
        assert row.reference
        assert row.kernel is attend
    assert SCHEMES["int8"].formats == ("int8 per_channel", "int8 per_channel", "-", "-")


def test_a_fast_kernel_is_taken_on_its_device_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operators, "_ROWS", dict(operators._ROWS))
    calls: list[int] = []

    def fast(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return attend(*args, **kwargs)  # type: ignore[arg-type]

    register_operator(Operator("attention", SCHEMES["int8"].formats, fast, device="cpu"))
    assert find_operator("attention", SCHEMES["int8"].formats, "cuda").kernel is attend
    model = zoo.build("llama")
    set_attention(model, "int8")
    zoo.outputs(model, zoo.ids_for(model))
    assert len(calls) == 2


def test_what_has_no_row():
    with pytest.raises(
        SchemeError, match=r"no kernel for attention on int3 x int3 on cpu; there are: int8 per_channel x"
    ):
        find_operator("attention", ("int3", "int3"), "cpu")


def test_the_table_in_the_docs_is_that_of_the_program():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = [row for row in operators.operators() if row.operation == "linear" and not row.reference]
    assert len(rows) == 7
    for row in rows:
        assert f"| {row.formats[1]} |" in page
    assert rows[0].formats[0] in page
    assert rows[-1].formats[0] in page
