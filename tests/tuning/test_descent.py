"""The descent's promises: never worse than the start as measured, repeatable, and exact about what it hands back."""

import math

import pytest
import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QTensor, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.numerics.spec import int_weight
from bitgrain.tuning.descent import Descent, Schedule, descend, shuffled, spread
from bitgrain.tuning.learned import Learn, learned_weights
from random_specs import same


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = random(12, 32)
INPUTS = random(6, 60, 12, seed=1) @ random(12, 32, seed=2)  # correlated, as activations are
START = {"a": quantize(WEIGHT, int_weight(2, 16, asymmetric=True, scale=FP16))}


def loss(dense: dict[str, Tensor], extras: dict[str, Tensor], index: int) -> Tensor:
    """Squared error of a linear layer with a gain."""
    gain = extras.get("gain", torch.ones(12))
    x = INPUTS[index]
    return (x @ dense["a"].T * gain - x @ WEIGHT.T).square().mean()


def walk(schedule: Schedule, learn: Learn, extras: dict[str, Tensor] | None = None, **settings) -> Descent:
    views = dict(learned_weights(START, learn, {"a": WEIGHT}))
    return descend(START, views, extras or {}, settings.get("loss", loss), 6, schedule, settings.get("report"))


ADAM = Schedule(40, {"scales": 0.04, "offsets": 0.02, "extras": 0.02}, "adam", warmup=4)
SIGN = Schedule(40, {"scales": 0.025, "offsets": 0.025, "lows": 0.025}, "sign")


def measured(state: Descent, batches: list[int]) -> float:
    dense = {name: q.dequantize() for name, q in state.qtensors.items()}
    extras = {name: tensor.float() for name, tensor in state.extras.items()}
    return math.fsum(float(loss(dense, extras, i)) for i in batches) / len(batches)


@pytest.mark.parametrize("learn", [Learn(), Learn(True), Learn(True, "range"), Learn(True, "kept")], ids=str)
@pytest.mark.parametrize("schedule", [ADAM, SIGN], ids=["adam", "sign"])
def test_it_descends_and_reports_what_it_hands_back(schedule: Schedule, learn: Learn):
    found = walk(schedule, learn)
    assert found.best_loss < 0.9 * found.first_loss
    assert found.best_step in (8, 16, 24, 32, 40)
    assert measured(found, list(range(6))) == pytest.approx(found.best_loss, rel=1e-12)


def test_extras_are_tuned_and_keep_their_dtype():
    gain = torch.ones(12, dtype=torch.bfloat16)
    found = walk(ADAM, Learn(scales="kept"), {"gain": gain})
    assert found.extras["gain"].dtype == torch.bfloat16
    assert not torch.equal(found.extras["gain"], gain)
    assert gain.eq(1).all()
    assert found.best_loss < found.first_loss
    assert measured(found, list(range(6))) == pytest.approx(found.best_loss, rel=1e-12)
    left = walk(Schedule(10, {"scales": 0.02}, "adam"), Learn(), {"gain": gain})
    assert torch.equal(left.extras["gain"], gain)


def test_the_start_comes_back_where_nothing_is_better():
    found = walk(Schedule(5, {"scales": 1e4}, "adam", checks=5), Learn())
    assert found.best_step == 0
    assert found.best_loss == found.first_loss
    assert same(found.qtensors["a"], START["a"])


@pytest.mark.parametrize("steps", [0, 5])
def test_nothing_to_learn_is_the_start(steps: int):
    found = walk(Schedule(steps, {"scales": 0.1} if steps == 0 else {}, "adam"), Learn())
    assert (found.best_step, found.qtensors) == (0, START)


@pytest.mark.parametrize("schedule", [ADAM, SIGN], ids=["adam", "sign"])
def test_the_same_seed_gives_the_same_bits(schedule: Schedule):
    first, second = walk(schedule, Learn(True)), walk(schedule, Learn(True))
    assert same(first.qtensors["a"], second.qtensors["a"])
    assert first.best_loss == second.best_loss
    other = walk(Schedule(**{**schedule.__dict__, "seed": 1}), Learn(True))
    assert not same(first.qtensors["a"], other.qtensors["a"])


def test_a_step_is_the_mean_over_its_batches():
    """One signed step over all batches equals the step that the whole set at once would give."""
    whole = {"a": WEIGHT.clone().requires_grad_(True)}
    views = dict(learned_weights(START, Learn(), None))
    dense = {"a": views["a"].weight()}
    (sum(loss(dense, {}, i) for i in range(6)) / 6).backward()
    expected = -torch.sign(views["a"].parameters()["scales"].grad) * 0.01
    found = walk(Schedule(1, {"scales": 0.01}, "sign", batch_size=6, checks=1), Learn())
    stored, start = found.qtensors["a"].scale, START["a"].scale
    assert found.best_step == 1
    assert isinstance(stored, Tensor)
    assert isinstance(start, Tensor)
    assert torch.equal(stored, (start.float() * (1 + expected / 2)).half())
    assert whole["a"].grad is None


def test_progress_is_told():
    told: list[tuple[int, float]] = []
    walk(Schedule(7, {"scales": 0.01}, "adam"), Learn(), report=lambda step, value: told.append((step, value)))
    assert [step for step, _ in told] == list(range(1, 8))
    assert all(value > 0 for _, value in told)


def test_a_loss_that_is_not_a_number_is_refused():
    def broken(dense: dict[str, Tensor], extras: dict[str, Tensor], index: int) -> Tensor:
        return dense["a"].sum() * math.nan

    with pytest.raises(NumericsError, match="loss of the start is nan"):
        walk(ADAM, Learn(), loss=broken)

    def breaks_later(dense: dict[str, Tensor], extras: dict[str, Tensor], index: int) -> Tensor:
        return loss(dense, extras, index) * (math.nan if dense["a"].requires_grad else 1.0)

    with pytest.raises(NumericsError, match="became nan in step 1; lower the learning rates"):
        walk(ADAM, Learn(), loss=breaks_later)


def test_weights_without_a_view_stay():
    start: dict[str, QTensor] = {**START, "b": quantize(random(4, 8), int_weight(8))}

    def both(dense: dict[str, Tensor], extras: dict[str, Tensor], index: int) -> Tensor:
        return loss(dense, extras, index) + 0 * dense["b"].sum()

    views = {name: view for name, view in learned_weights(start, Learn()) if name == "a"}
    found = descend(start, views, {}, both, 6, ADAM)
    assert list(found.qtensors) == ["a", "b"]
    assert same(found.qtensors["b"], start["b"])
    assert not same(found.qtensors["a"], start["a"])


def test_the_order_of_batches():
    order = shuffled(5, 3)
    epochs = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    assert spread(10, 0) == spread(10, 99) == list(range(10))
    assert spread(10, 2) == [2, 7]
    assert spread(9, 3) == [1, 4, 7]


def test_the_rates_over_time():
    linear = Schedule(10, {}, "adam", warmup=2)
    assert [linear.factor(i) for i in (0, 1, 5, 9)] == pytest.approx([0.5, 0.9, 0.5, 0.1])
    cosine = Schedule(10, {}, "adam", decay="cosine")
    assert [cosine.factor(i) for i in (0, 5)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"optimizer": "sgd"}, "sign and adam"),
        ({"decay": "none"}, "linear and cosine"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"rates": {"scales": math.inf}}, "rates are finite"),
    ],
)
def test_impossible_settings(wrong: dict, text: str):
    with pytest.raises(SchemeError, match=text):
        Schedule(**{"steps": 1, "rates": {}, "optimizer": "adam", **wrong})
