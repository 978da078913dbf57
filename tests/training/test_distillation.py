"""The distillation loss, and the state that a loss which is not finite goes back to."""

import pytest
import torch
from torch import nn

import zoo
from bitgrain.errors import ModelError, TrainingError
from bitgrain.training import distillation
from bitgrain.training.distillation import distillation_loss, kl_divergence
from bitgrain.training.last_good import LastGood


def test_it_is_the_mean_kl_divergence_in_any_pieces(monkeypatch: pytest.MonkeyPatch):
    mine = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    theirs = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True) / 14
    (by_mine,) = torch.autograd.grad(expected, mine)
    for chunk in (4 * 11, 4 * 11 * 5, 1 << 26):
        monkeypatch.setattr(distillation, "_CHUNK", chunk)
        found = kl_divergence(mine, theirs)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert torch.allclose(torch.autograd.grad(found, mine)[0], by_mine, atol=1e-7)
    assert float(kl_divergence(mine.detach(), mine.detach())) == pytest.approx(0, abs=1e-6)


def test_padding_does_not_count():
    student, teacher = zoo.build("llama"), zoo.build("llama", num_hidden_layers=1)
    ids = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        found = distillation_loss(student, teacher, {"input_ids": ids, "attention_mask": mask})
        first = distillation_loss(student, teacher, {"input_ids": ids[:1, :6]})
        second = distillation_loss(student, teacher, {"input_ids": ids[1:]})
    assert float(found) == pytest.approx(float(first * 6 + second * 9) / 15, rel=1e-4)


def test_a_model_without_logits_is_refused():
    bert = zoo.build("bert")
    with pytest.raises(ModelError, match="no logits"):
        distillation_loss(bert, bert, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})


def test_the_last_good_state_is_put_back():
    module = nn.Linear(3, 2)
    good = LastGood(module, every=2)
    states: list[torch.Tensor] = []
    for value in (3.0, 2.0, 1.0, 0.5):
        good.check(torch.tensor(value))
        states.append(module.weight.detach().clone())
        with torch.no_grad():
            module.weight.add_(1.0)
    with pytest.raises(TrainingError, match="loss 5 is nan; the module is as it was 2 losses before"):
        good.check(torch.tensor(torch.nan))
    assert torch.equal(module.weight, states[2])


def test_a_loss_that_was_never_finite():
    with pytest.raises(TrainingError, match="from the start"):
        LastGood(nn.Linear(3, 2)).check(torch.tensor(torch.inf))
