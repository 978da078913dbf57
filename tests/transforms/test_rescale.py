"""Rescaling and mixing against plain loops, for every layout of rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitgrain.transforms.base import Pair
from bitgrain.transforms.rescale import (
    bias_of,
    mix_heads,
    names_of,
    rescale,
    restoring,
    to_channels,
    to_columns,
    writer_rows,
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Pair, int]:
    """A linear pair with heads, and the number of rows of its writer."""
    head, heads, repeats = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = head * heads
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if draw(st.booleans()):  # the heads' rows apart from each other
        stride = before + head + after
        place = {"start": before, "span": head, "stride": stride}
        rows = stride * heads
    else:
        place, rows = {"start": before}, before + width + after
    pair = Pair("linear", "up.weight", ("down.weight",), width, bias="up.bias", repeats=repeats, head=head, **place)
    return pair, rows


def slow_rows(pair: Pair) -> list[int]:
    rows = range(pair.start, 10_000)
    if pair.span:
        rows = [row for row in rows if (row - pair.start) % pair.stride < pair.span]
    return list(rows)[: pair.width]


def slow_channel(pair: Pair, column: int) -> int:
    """Which channel a column of the reader reads."""
    query_head, place = divmod(column, pair.head)
    return query_head // pair.repeats * pair.head + place


class _Two(nn.Module):
    def __init__(self, pair: Pair, rows: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, rows), nn.Linear(pair.width * pair.repeats, 5)


@settings(max_examples=25, deadline=None)
@given(layouts(), st.integers(0, 3))
def test_rescale_equals_loops(layout: tuple[Pair, int], seed: int):
    pair, rows = layout
    torch.manual_seed(seed)
    module = _Two(pair, rows)
    factors = torch.rand(pair.width) + 0.5
    up, bias, down = (p.detach().clone() for p in (module.up.weight, module.up.bias, module.down.weight))
    for channel, row in enumerate(slow_rows(pair)):
        up[row] /= factors[channel]
        bias[row] /= factors[channel]
    for column in range(down.shape[1]):
        down[:, column] *= factors[slow_channel(pair, column)]
    assert writer_rows(pair, torch.device("cpu")).tolist() == slow_rows(pair)
    rescale(module, pair, factors)
    for mine, slow in ((module.up.weight, up), (module.up.bias, bias), (module.down.weight, down)):
        torch.testing.assert_close(mine.data, slow)


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_columns_and_channels_are_inverse(layout: tuple[Pair, int]):
    pair, _ = layout
    channels = torch.arange(pair.width)
    columns = to_columns(pair, channels)
    assert columns.tolist() == [slow_channel(pair, column) for column in range(pair.width * pair.repeats)]
    assert to_channels(pair, columns).tolist() == [channels.tolist()] * pair.repeats


@settings(max_examples=25, deadline=None)
@given(layouts(), st.integers(0, 3))
def test_mixing_a_head_leaves_what_passes_through_it(layout: tuple[Pair, int], seed: int):
    pair, rows = layout
    torch.manual_seed(seed)
    module, x = _Two(pair, rows), torch.randn(6, 3)
    read = [slow_rows(pair)[slow_channel(pair, column)] for column in range(pair.width * pair.repeats)]

    def output() -> torch.Tensor:
        return module.down(module.up(x)[:, read])

    before, inner = output(), module.up(x)[:, slow_rows(pair)].detach()
    rotations = torch.linalg.qr(torch.randn(pair.width // pair.head, pair.head, pair.head))[0]
    mix_heads(module, pair, rotations)
    torch.testing.assert_close(output(), before, rtol=1e-4, atol=1e-5)
    mixed = torch.cat([part @ r for part, r in zip(inner.split(pair.head, 1), rotations)], 1)
    torch.testing.assert_close(module.up(x)[:, slow_rows(pair)], mixed, rtol=1e-4, atol=1e-5)


def test_restoring_gives_back_the_bits():
    module = _Two(Pair("linear", "up.weight", ("down.weight",), 4), 4)
    pair = Pair("linear", "up.weight", ("down.weight",), 4, bias="up.bias")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with restoring(module, names_of(pair)):
        rescale(module, pair, torch.tensor([0.3, 0.7, 1.1, 1.9]))
        assert not torch.equal(module.up.weight, before["up.weight"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_biases_of_linears_and_of_stacks():
    stack = nn.Module()
    for name, shape in (("up", (3, 8, 4)), ("up_bias", (3, 8)), ("down", (3, 4, 4)), ("down_bias", (3, 4))):
        setattr(stack, name, nn.Parameter(torch.zeros(shape)))
    outer = nn.ModuleDict({"experts": stack, "plain": nn.Linear(2, 3), "bare": nn.Linear(2, 3, bias=False)})
    names = ("experts.up", "experts.down", "plain.weight", "bare.weight")
    assert [bias_of(outer, name) for name in names] == ["experts.up_bias", "experts.down_bias", "plain.bias", ""]
