"""Which axes may carry scales is derived, not listed; the docs show what is derived."""

from pathlib import Path

import pytest

from bitgrain.errors import SchemeError
from bitgrain.numerics import QuantSpec, per_channel, per_group, per_token
from bitgrain.numerics.formats import IntFormat
from bitgrain.runtime.attention import AttentionScheme
from bitgrain.runtime.attention.contraction import PV, QK, Contraction, axes_table

DOCS = Path(__file__).parents[3] / "docs" / "attention.md"


def test_what_is_summed_over_carries_no_scales():
    assert (QK.allowed(0), QK.allowed(1)) == ("bhq", "bhk")
    assert (PV.allowed(0), PV.allowed(1)) == ("bhq", "bhd")
    linear = Contraction("X W^T", "ti,oi->to")
    assert (linear.allowed(0), linear.allowed(1)) == ("t", "o")
    groups = Contraction("X W^T in groups", "tgi,ogi->tog")  # partial sums: groups are not summed over
    assert (groups.allowed(0), groups.allowed(1)) == ("tg", "og")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": per_channel(1), "k": per_token()}, r"mine: Q: scales cannot vary by channel, since Q K\^T sums over it"),
        ({"q": per_token(), "k": per_group(32)}, r"mine: K: scales cannot vary by channel.*batch, head, key token"),
        ({"p": per_channel(1), "v": per_channel(1)}, r"mine: P: scales cannot vary by key token, since P V sums"),
        ({"p": per_token(), "v": per_token()}, r"mine: V: scales cannot vary by key token.*batch, head, channel"),
        ({"q": per_token()}, "two operands of a product are quantized together"),
    ],
)
def test_schemes_without_a_meaning(changes, message: str):
    specs = {name: QuantSpec(IntFormat(8), granularity, dynamic=True) for name, granularity in changes.items()}
    with pytest.raises(SchemeError, match=message):
        AttentionScheme("mine", **specs)


def test_zero_points_are_refused():
    spec = QuantSpec(IntFormat(8), per_token(), zero_point="real", dynamic=True)
    with pytest.raises(SchemeError, match="zero points are not taken out"):
        AttentionScheme("mine", q=spec, k=spec)


def test_the_docs_show_the_table():
    assert axes_table() in DOCS.read_text()
