"""The measure by which rewrites are proved."""

import pytest
import torch
from torch import nn

from bitgrain.errors import NumericsError
from bitgrain.transforms.proof import check_same, difference, routes


def test_difference_is_relative_to_the_spread():
    before = torch.tensor([[0.0, 0.0], [100.0, 100.0]])  # standard deviation 50
    after = before.clone()
    after[0, 1] = 5.0
    assert difference(before, after) == pytest.approx(0.1)
    assert difference(before * 7, after * 7) == pytest.approx(0.1)


def test_what_cannot_be_compared_is_infinitely_far():
    x = torch.randn(4, 3)
    for other in (x[:2], torch.full_like(x, float("nan")), x / 0):
        assert difference(x, other) == float("inf")
        with pytest.raises(NumericsError, match=r"block\.7: rolling changed the full-precision output by inf"):
            check_same(x, other, "block.7", "rolling")


def test_one_token_in_a_hundred_may_take_another_expert():
    before = torch.randn(200, 4)
    after = before.clone()
    after[:2] += 1
    assert difference(before, after, routed=True) == 0
    assert difference(before, after) > 0.1
    after[2] += 1
    assert difference(before, after, routed=True) > 0.1


def test_modules_that_route():
    stack, expert = nn.Module(), nn.Module()
    stack.weight = nn.Parameter(torch.zeros(2, 3, 4))
    expert.experts = nn.ModuleList([nn.Linear(2, 2)])
    assert routes(stack)
    assert routes(expert)
    assert not routes(nn.Linear(3, 3))
