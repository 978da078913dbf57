"""Training a small classifier: the loss falls on inputs held back, any stop is taken up again, NaN leaves the best."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bitgrain.errors import NumericsError, SchemeError, TrainingError
from bitgrain.numerics import IntFormat, QTensor, QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.formats import FP16
from bitgrain.training.adam import Adam
from bitgrain.training.descent import Outcome, Training, held_back
from bitgrain.training.settings import TrainingSettings
from random_specs import same


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"first": random(40, 32, seed=0) / 6, "second": random(20, 40, seed=1) / 2}
GAIN = torch.ones(32)
INPUTS = random(40, 50, 32, seed=2) @ random(32, 32, seed=4)
SETTINGS = TrainingSettings(steps=60, batch=2, rate=0.01, scale_rate=0.008, extra_rate=0.008, checks=6)


def predictions(dense: Mapping[str, Tensor], gain: Tensor, x: Tensor) -> Tensor:
    return torch.log_softmax(torch.tanh((x * gain) @ dense["first"].T) @ dense["second"].T, -1)


def loss(dense: Mapping[str, Tensor], extras: Mapping[str, Tensor], windows: Sequence[int]) -> Tensor:
    x = INPUTS[list(windows)]
    base = predictions(WEIGHTS, GAIN, x)
    return (base.exp() * (base - predictions(dense, extras["gain"], x))).sum(-1).mean()


def rounded(spec: QuantSpec) -> dict[str, QTensor]:
    return {name: quantize(weight, spec) for name, weight in WEIGHTS.items()}


class Kept:
    """A keeper in memory; stop: after how many steps it throws."""

    def __init__(self, stop: int = -1) -> None:
        self.stop = stop
        self.state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.found: tuple[dict[str, QTensor], dict[str, Tensor]] | None = None

    def best(self, qtensors: Mapping[str, QTensor], extras: Mapping[str, Tensor]) -> None:
        self.found = dict(qtensors), dict(extras)

    def save(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], last: bool) -> None:
        self.state = {name: tensor.clone() for name, tensor in tensors.items()}, dict(record)
        assert last == (record["step"] == SETTINGS.steps)
        if record["step"] == self.stop:
            raise KeyboardInterrupt

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.state


def train(spec: QuantSpec, keeper: Kept, settings: TrainingSettings = SETTINGS, loss: Any = loss) -> Outcome:
    training = Training(rounded(spec), WEIGHTS, {"gain": GAIN}, loss, len(INPUTS), settings)
    return training.run(keeper, lambda _, __: None)


SPECS = {
    "int2": QuantSpec(IntFormat(2), per_group(8), zero_point="integer", scale=FP16),
    "ternary": QuantSpec(get_format("ternary"), per_group(8)),
    "uint3": QuantSpec(get_format("uint3"), per_group(8), zero_point="real", scale=FP16),
    "nested": QuantSpec(get_format("nf4"), per_group(8), scale=QuantSpec(IntFormat(8, False), per_group(4))),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_loss_falls_on_windows_held_back(name: str):
    keeper = Kept()
    outcome = train(SPECS[name], keeper)
    assert outcome.best_loss < (0.95 if name == "nested" else 0.9) * outcome.first_loss  # nested scales stay
    assert keeper.found is not None
    qtensors, extras = keeper.found
    start = rounded(SPECS[name])
    assert any(not torch.equal(q.codes, start[key].codes) for key, q in qtensors.items())
    assert all(q.spec == start[key].spec for key, q in qtensors.items())
    dense = {key: q.dequantize() for key, q in qtensors.items()}
    windows = held_back(len(INPUTS), SETTINGS)
    again = math.fsum(float(loss(dense, extras, [i])) for i in windows) / len(windows)
    assert again == pytest.approx(outcome.best_loss, rel=1e-6)


def test_stopped_anywhere_it_ends_in_the_same_state():
    whole, stopped = Kept(), Kept()
    expected = train(SPECS["int2"], whole)
    for stop in (1, 9, 10, 35):
        stopped.stop = stop
        with pytest.raises(KeyboardInterrupt):
            train(SPECS["int2"], stopped)
    stopped.stop = -1
    assert train(SPECS["int2"], stopped) == expected
    assert whole.found is not None
    assert stopped.found is not None
    assert all(same(q, stopped.found[0][name]) for name, q in whole.found[0].items())
    assert torch.equal(whole.found[1]["gain"], stopped.found[1]["gain"])
    assert train(SPECS["int2"], stopped) == expected  # all steps are done: nothing is trained any more


def test_a_step_takes_its_windows_all_at_once_or_one_by_one():
    found = []
    for at_once in (1, 2):
        keeper = Kept()
        train(SPECS["int2"], keeper, TrainingSettings(**{**vars(SETTINGS), "at_once": at_once}))
        assert keeper.state is not None
        found.append(keeper.state[0])
    for name, tensor in found[0].items():
        if name.startswith("mean."):
            assert torch.allclose(tensor, found[1][name], atol=0.05 * float(tensor.abs().max()) + 1e-8)


def test_every_window_is_trained_on_once_before_any_is_again():
    training = Training(rounded(SPECS["int2"]), {}, {"gain": GAIN}, loss, len(INPUTS), SETTINGS)
    back = held_back(len(INPUTS), SETTINGS)
    assert len(back) == 4
    drawn = [i for step in range(36) for i in training._windows(step)]  # pyright: ignore[reportPrivateUsage]
    assert sorted(drawn[:36]) == sorted(drawn[36:]) == [i for i in range(40) if i not in back]
    assert drawn[:36] != drawn[36:]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nan_stops_and_leaves_the_best_state(broken: str):
    calls = 0

    def failing(dense: Mapping[str, Tensor], extras: Mapping[str, Tensor], windows: Sequence[int]) -> Tensor:
        nonlocal calls
        value = loss(dense, extras, windows)
        calls += torch.is_grad_enabled()
        if calls < 90:  # two windows a step, one at a time
            return value
        return value * math.nan if broken == "loss" else value + (0 * dense["first"]).sum().sqrt()

    keeper = Kept()
    training = Training(rounded(SPECS["int2"]), WEIGHTS, {"gain": GAIN}, failing, len(INPUTS), SETTINGS)
    with torch.enable_grad(), pytest.raises(TrainingError, match="in step 45"):
        training.run(keeper, lambda _, __: None)
    assert training.outcome is not None
    assert 0 < training.outcome.best_step <= 40
    assert keeper.state is not None
    assert keeper.state[1]["step"] == 44
    assert keeper.found is not None
    dense = {name: q.dequantize() for name, q in keeper.found[0].items()}
    assert all(bool(tensor.isfinite().all()) for tensor in dense.values())


def test_a_start_without_a_loss_is_no_matter_of_training():
    def broken(dense: Any, extras: Any, windows: Any) -> Tensor:
        return torch.tensor(math.nan)

    with pytest.raises(NumericsError, match="the start"):
        train(SPECS["int2"], Kept(), loss=broken)


def test_what_is_not_asked_for_stays():
    keeper = Kept()
    settings = TrainingSettings(**{**vars(SETTINGS), "rate": 0.0, "extra_rate": 0.0})
    train(SPECS["int2"], keeper, settings)
    assert keeper.found is not None
    start = rounded(SPECS["int2"])
    assert all(torch.equal(q.codes, start[name].codes) for name, q in keeper.found[0].items())
    assert any(not torch.equal(q.scale, start[name].scale) for name, q in keeper.found[0].items())  # type: ignore[arg-type]
    assert torch.equal(keeper.found[1]["gain"], GAIN)


def test_adam_is_torchs():
    tensors = [random(5, 3, seed=i).requires_grad_(True) for i in range(2)]
    rate = torch.tensor(0.01)
    mine = Adam({"x": (tensors[0], rate)})
    with torch.no_grad():
        tensors[1].copy_(tensors[0])
    theirs = torch.optim.Adam([tensors[1]], lr=0.01, betas=(0.9, 0.99), eps=1e-12)
    for i in range(5):
        for tensor in tensors:
            (tensor * random(5, 3, seed=10 + i)).sin().sum().backward()
        mine.step()
        theirs.step()
        theirs.zero_grad()
        assert torch.allclose(*tensors, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "says"),
    [({"loss": "mse"}, "distill or next_token"), ({"batch": 0}, "batch is at least 1"), ({"rate": math.nan}, "rate")],
)
def test_impossible_settings(setting: dict[str, Any], says: str):
    with pytest.raises(SchemeError, match=says):
        TrainingSettings(**setting)
