"""Moments of a stage's inputs: the plain sums, whatever the batches, and no NaN that goes unnoticed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitgrain.errors import NumericsError
from bitgrain.kernels.gram import gram, mirror
from bitgrain.pipeline.blockwise.batches import Pool
from bitgrain.pipeline.blockwise.gather import gather_moments
from bitgrain.pipeline.blockwise.runs import Kept, Seen
from bitgrain.pipeline.blockwise.stages import Stage
from bitgrain.runtime.watch import Key
from bitgrain.solvers import Moments
from block_zoo import open_block

pytestmark = pytest.mark.usefixtures("device")

Tiny = Callable[[str], Path]

TOLERANCE = 1e-6
"""Of each mean of x_i y_j, relative to the root of the means of x_i^2 and y_j^2: float32 sums in another order."""

WIDTH, ROWS = 6, 5
SHARED = Stage(("a", "b"), True, {"b": ""})
EXPERTS = Stage(("w",), False)
A = Key("a")


def tokens(seed: int, count: int, width: int = WIDTH) -> Tensor:
    """Inputs of very different sizes, and not centred."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, width)
    return (torch.randn(count, width, generator=generator) + 0.5) * sizes


def gathered(stage: Stage, seen: list[Seen], full: list[Seen] | None = None) -> dict[Key, Moments]:
    with Pool(2) as pool:
        return gather_moments(
            stage,
            len(seen),
            seen.__getitem__,
            None if full is None else full.__getitem__,
            pool,
            "layers.3",
        )


def close(found: Tensor | None, left: Tensor, right: Tensor) -> None:
    """`found` is the mean of left^T right."""
    assert found is not None
    assert found.dtype == torch.float32
    exact = left.double().T @ right.double() / len(left)
    scale = left.double().square().mean(0).sqrt()[:, None] * right.double().square().mean(0).sqrt()
    assert bool(((found.double() - exact).abs() <= TOLERANCE * scale).all())


def parts(x: Tensor, cuts: list[int]) -> list[Tensor]:
    ends = [0, *sorted(cuts), len(x)]
    return [x[a:b] for a, b in pairwise(ends)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=12), st.integers(0, 1000))
def test_any_split_into_batches_gives_the_moments_of_all_tokens(cuts: list[int], seed: int):
    now, then = tokens(seed, 300), tokens(seed, 300) + 0.1 * tokens(seed + 1, 300)
    stream, target = tokens(seed + 2, 300, ROWS), tokens(seed + 3, 300, ROWS)
    split = [parts(one, cuts) for one in (now, then, stream, target)]
    seen = [Seen({A: x}, {"b": r}) for x, r in zip(split[0], split[2], strict=True)]
    full = [Seen({A: x}, {"b": r}) for x, r in zip(split[1], split[3], strict=True)]
    found = gathered(SHARED, seen, full)
    assert found.keys() == {Key("a"), Key("b")}
    for name in ("a", "b"):
        moments = found[Key(name)]
        assert moments.tokens == 300
        close(moments.hessian, now, now)
        close(moments.cross, then, now)
    assert found[A].residual is None
    lacking = found[Key("b")].residual
    assert lacking is not None
    exact = (target.double() - stream.double()).T @ now.double() / 300
    size = torch.maximum(target.abs(), stream.abs()).double().square().mean(0).sqrt()[:, None]
    assert bool(((lacking - exact).abs() <= 2 * TOLERANCE * size * now.double().square().mean(0).sqrt()).all())
    assert torch.equal(found[A].importance, found[A].hessian.diagonal())


def test_batches_are_added_in_their_order():
    """The same bits for any number of threads."""
    x = tokens(0, 400)
    seen = [Seen({A: part}) for part in x.split(7)]
    found: list[Tensor] = []
    for workers in (1, 2, 5):
        with Pool(workers) as pool:
            found.append(gather_moments(SHARED, len(seen), seen.__getitem__, None, pool, "x")[A].hessian)
    total = torch.zeros(WIDTH, WIDTH)
    for i, part in enumerate(x.split(7)):
        total = gram(part) if i == 0 else total + gram(part)
    total = mirror(total / 400)
    assert all(torch.equal(one, total) for one in found)


def test_experts_have_moments_of_their_own_tokens():
    x = tokens(1, 90)
    chosen = torch.arange(90) % 3  # expert 3 gets none, expert 2 none in the second batch
    chosen[45:][chosen[45:] == 2] = 0
    seen = [
        Seen({Key("w", i): part[expert == i] for i in (0, 1, 2) if bool((expert == i).any())})
        for part, expert in ((x[:45], chosen[:45]), (x[45:], chosen[45:]))
    ]
    found = gathered(EXPERTS, seen, full=seen)
    assert found.keys() == {Key("w", 0), Key("w", 1), Key("w", 2)}
    for key, moments in found.items():
        mine = x[chosen == key.expert]
        assert moments.tokens == len(mine)
        close(moments.hessian, mine, mine)
        assert moments.cross is None  # the full-precision model sends it other tokens


def test_no_tokens_are_no_moments():
    seen = [Seen({Key("w", 0): tokens(0, 5), Key("w", 1): tokens(0, 0)}), Seen({})]
    assert gathered(EXPERTS, seen).keys() == {Key("w", 0)}
    assert gathered(EXPERTS, [Seen({})]) == {}


def test_experts_in_a_list_are_not_compared_with_other_tokens():
    """As many tokens are not the same tokens."""
    now, then = Seen({A: tokens(0, 5)}), Seen({A: tokens(1, 5)})
    assert gathered(Stage(("a", "b"), False), [now], [then])[A].cross is None


def test_without_the_full_model_there_is_nothing_to_compare():
    found = gathered(SHARED, [Seen({A: tokens(0, 9)}, {"b": tokens(1, 9, ROWS)})])
    assert all(moments.cross is moments.residual is None for moments in found.values())


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 1e30])
def test_activations_that_overflow_are_named(worst: float):
    bad = tokens(0, 8)
    bad[3, 2] = worst
    seen = [Seen({A: tokens(1, 8)}), Seen({A: bad})]
    with pytest.raises(NumericsError, match=r"^layers\.3\.a: its inputs hold NaN or Inf.*check its weights"):
        gathered(SHARED, seen)


def test_of_a_real_block(tiny: Tiny):
    block = open_block(tiny("llama"))
    stages = block.stages()
    hidden = torch.cat([one.reshape(-1, one.shape[-1]) for one in block.inputs])
    normed = block.module.get_submodule("input_layernorm")(hidden)
    with Kept(block.module, block.inputs, block.calls, stages) as walk, Pool(2) as pool:
        found = gather_moments(stages[0], 3, lambda batch: walk.seen(batch, 0), None, pool, "layers.0")
        assert {key.name for key in found} == set(stages[0].names)
        assert all(moments.tokens == len(hidden) for moments in found.values())
        close(found[Key(stages[0].names[0])].hessian, normed, normed)
