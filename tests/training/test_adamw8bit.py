"""AdamW with 8-bit states, beside torch's AdamW."""

import io
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zoo
from bitgrain.errors import NumericsError, SchemeError
from bitgrain.training import AdamW8bit
from bitgrain.training.adamw8bit import state_nbytes


def problem() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> float:
    """Learn to shift vectors by one place; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_with_32_bit_states_it_is_torchs_to_the_bit():
    a, b = problem(), problem()
    groups = [[{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 1e-3}] for m in (a, b)]
    settings: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    walk(a, torch.optim.AdamW(groups[0], foreach=False, **settings), 20)
    walk(b, AdamW8bit(groups[1], min_8bit_size=10**9, **settings), 20)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_loss_is_adamws_and_the_states_a_quarter():
    a, b = problem(), problem()
    exact, rounded = torch.optim.AdamW(a.parameters(), lr=3e-3), AdamW8bit(b.parameters(), lr=3e-3)
    first, second = walk(a, exact, 150), walk(b, rounded, 150)
    assert second == pytest.approx(first, rel=0.01)
    assert state_nbytes(rounded) <= 0.27 * state_nbytes(exact)
    large, small = b[0].weight, b[0].bias
    assert rounded.state[large]["exp_avg_codes"].dtype == torch.uint8
    assert rounded.state[small]["exp_avg"].dtype == torch.float32
    exact_second = exact.state[a[0].weight]["exp_avg_sq"]
    assert torch.allclose(rounded.moment(large, "exp_avg_sq"), exact_second, atol=0.1 * exact_second.max().item())


def test_a_second_moment_that_is_there_is_never_stored_as_zero():
    p = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([p], lr=1e-3)
    p.grad = torch.full((4096,), 1e-6)
    p.grad[::256] = 1.0
    optimizer.step()
    p.grad.zero_()
    before = p.detach().clone()
    optimizer.step()  # with a second moment of 0 the step would be the first moment over eps
    assert (p - before).abs().max() < 1e-2
    assert (optimizer.moment(p, "exp_avg_sq") > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_survive_saving_and_loading(dtype: torch.dtype):
    a, b = problem().to(dtype), problem().to(dtype)
    generator = torch.Generator().manual_seed(3)
    gradients = [[torch.randn(p.shape, generator=generator).to(dtype) for p in a.parameters()] for _ in range(6)]

    def step(model: nn.Module, optimizer: AdamW8bit, given: list[torch.Tensor]) -> None:
        for p, gradient in zip(model.parameters(), given, strict=True):
            p.grad = gradient.clone()
        optimizer.step()

    one = AdamW8bit(a.parameters(), lr=1e-2)
    for given in gradients[:3]:
        step(a, one, given)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    b.load_state_dict(a.state_dict())
    two = AdamW8bit(b.parameters(), lr=7.0)
    two.load_state_dict(torch.load(file, weights_only=True))
    for given in gradients[3:]:
        step(a, one, given)
        step(b, two, given)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_nan_is_one_clear_error_and_leaves_the_tensor():
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(64, 64)
    optimizer.step()
    before, codes = p.detach().clone(), optimizer.state[p]["exp_avg_codes"].clone()
    p.grad[3, 3] = torch.nan
    with pytest.raises(NumericsError, match=r"gradient of \(64, 64\) holds 1 NaN .*lower the rate"):
        optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["exp_avg_codes"], codes)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_settings_without_a_meaning(settings: dict[str, Any]):
    with pytest.raises(SchemeError, match="not negative"):
        AdamW8bit([nn.Parameter(torch.zeros(2))], **settings)


def test_closures_and_schedulers():
    model = problem()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 4)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 64)).square().mean()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure))
        schedule.step()
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_in_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = zoo.build("llama", num_hidden_layers=1)
    ids = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": one, "labels": one} for one in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        save_steps=2, logging_steps=1, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip

    def trainer() -> transformers.Trainer:
        optimizer = AdamW8bit(model.parameters(), lr=1e-2)
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))

    first = trainer()
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())
