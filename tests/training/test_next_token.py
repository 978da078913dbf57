"""The training loop: what a step sees, and that a loop which goes on ends in the same bits."""

from typing import Any

import pytest
import torch

import zoo
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.training import next_token
from bitgrain.training.next_token import TrainSettings, TrainState, next_token_loss, train_next_token

WINDOWS = torch.randint(0, 128, (5, 12), generator=torch.Generator().manual_seed(0))
FEW = TrainSettings(steps=6, batch=2, rate=1e-2, save_every=2)


def small() -> Any:
    return zoo.build("llama", num_hidden_layers=1)


def test_the_loss_is_transformers():
    model = small()
    assert next_token_loss(model, WINDOWS).item() == pytest.approx(model(WINDOWS, labels=WINDOWS).loss.item(), rel=1e-6)


def test_every_window_is_seen_before_any_is_seen_again():
    settings = TrainSettings(batch=2, seed=3)
    places = [index for step in range(5) for index in settings.windows_of(step, 5)]
    assert sorted(places[:5]) == sorted(places[5:]) == list(range(5))
    assert places[:5] != places[5:]
    assert places != [index for step in range(5) for index in TrainSettings(batch=2, seed=4).windows_of(step, 5)]


def test_the_rate_rises_and_falls():
    settings = TrainSettings(steps=10, rate=1.0, warmup=0.2)
    assert [settings.rate_at(step) for step in range(10)] == pytest.approx([0.5, 1, *(i / 8 for i in range(8, 0, -1))])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_loop_that_goes_on_ends_in_the_same_bits(optimizer: Any):
    settings = TrainSettings(steps=6, batch=2, rate=1e-2, save_every=2, optimizer=optimizer)
    states: list[TrainState] = []

    def save(state: TrainState) -> None:
        states.append(TrainState(state.step, {k: v.clone() for k, v in state.tensors.items()}, state.losses))

    whole, part = small(), small()
    losses = train_next_token(whole, WINDOWS, settings, save=save)
    assert [state.step for state in states] == [2, 4]
    assert losses[-1] < losses[0]
    assert train_next_token(part, WINDOWS, settings, start=states[1]) == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_windows_one_by_one_give_the_gradients_of_the_batch():
    together, apart = small(), small()
    settings = TrainSettings(steps=1, batch=3, warmup=0.0)
    losses = [
        train_next_token(together, WINDOWS, settings),
        train_next_token(apart, WINDOWS, settings, each=lambda work, parts: map(work, parts)),
    ]
    assert losses[0] == pytest.approx(losses[1])
    pairs = zip(together.parameters(), apart.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_before_anything_is_spoiled(monkeypatch: pytest.MonkeyPatch, bad: str):
    model, states = small(), []
    calls = 0

    def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = next_token_loss(model, ids)
        if calls < 4:
            return value
        # the square root of 0 has an infinite derivative, which times 0 is NaN
        return value * torch.nan if bad == "loss" else value + (model.model.norm.weight * 0).sum().sqrt()

    monkeypatch.setattr(next_token, "next_token_loss", loss)
    with pytest.raises(NumericsError, match=r"stopped in step 4: .*(loss|gradients) is (nan|inf); lower the rate"):
        train_next_token(model, WINDOWS, FEW, save=states.append)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert [state.step for state in states] == [2]


def test_gradients_are_clipped():
    still, moved = small(), small()
    train_next_token(still, WINDOWS, TrainSettings(steps=1, batch=1, clip=1e-12, warmup=0.0))
    train_next_token(moved, WINDOWS, TrainSettings(steps=1, batch=1, warmup=0.0))
    start = dict(small().named_parameters())
    # AdamW's step does not depend on the size of gradients until eps weighs in
    distance = [max((p - start[n]).abs().max().item() for n, p in m.named_parameters()) for m in (still, moved)]
    assert distance[0] < 0.1 * distance[1]


def test_bad_settings_and_nothing_to_train():
    for settings in ({"steps": 0}, {"rate": 0.0}, {"optimizer": "lion"}, {"warmup": 2.0}):
        with pytest.raises(SchemeError):
            TrainSettings(**settings)  # type: ignore[arg-type]
    model = small().requires_grad_(False)
    with pytest.raises(SchemeError, match="no parameter"):
        train_next_token(model, WINDOWS, FEW)
    with pytest.raises(SchemeError, match="other parameters"):
        train_next_token(small(), WINDOWS, FEW, start=TrainState(2, {"a": torch.zeros(1)}, ()))
